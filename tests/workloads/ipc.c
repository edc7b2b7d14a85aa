/* One object in an IPC namespace, of the kind that the first argument says: shm, sem, msg or mq. Where such a container is refused, the
 * object must be named, and be there and work afterwards. With "gone" as second argument it is removed before READY, with "attached" a
 * segment stays attached. */
#include "workload.h"
#include <mqueue.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define KEY 0x70727030

static const char *kind;
static int is_gone, is_attached;
static int id = -1;

struct message { long type; char text[8]; };

static int is(const char *name) { return !strcmp(kind, name); }

static void make(void) {
    struct message message = {5, "message"};
    if (is("shm")) {
        id = MUST(shmget(KEY, 8192, IPC_CREAT | IPC_EXCL | 0600));
        char *at = MUST(shmat(id, NULL, 0));
        strcpy(at, "segment");
        if (!is_attached) MUST(shmdt(at));
    } else if (is("sem")) {
        id = MUST(semget(KEY, 1, IPC_CREAT | IPC_EXCL | 0600));
        MUST(semctl(id, 0, SETVAL, 3));
    } else if (is("msg")) {
        id = MUST(msgget(KEY, IPC_CREAT | IPC_EXCL | 0600));
        MUST(msgsnd(id, &message, sizeof message.text, 0));
    } else {
        struct mq_attr attr = {.mq_maxmsg = 3, .mq_msgsize = 8};
        mqd_t queue = MUST(mq_open("/queue", O_CREAT | O_EXCL | O_RDWR, 0600, &attr));
        MUST(mq_send(queue, "message", 8, 1));
        mq_close(queue);
    }
}

static void verify(void) {
    struct message message = {0, ""};
    if (is_gone) return;
    if (is("shm")) {
        char *at = MUST(shmat(id, NULL, 0));
        CHECK(!strcmp(at, "segment"), "the segment holds %.10s", at);
        MUST(shmdt(at));
    } else if (is("sem")) {
        CHECK(semctl(id, 0, GETVAL) == 3, "the semaphore is %d", semctl(id, 0, GETVAL));
    } else if (is("msg")) {
        CHECK(msgrcv(id, &message, sizeof message.text, 5, IPC_NOWAIT) == 8 && !strcmp(message.text, "message"), "the message");
        MUST(msgsnd(id, &message, sizeof message.text, 0));
    } else {
        char text[8] = "";
        mqd_t queue = mq_open("/queue", O_RDWR | O_NONBLOCK);
        CHECK(queue != -1 && mq_receive(queue, text, 8, NULL) == 8 && !strcmp(text, "message"), "the queue: %s", strerror(errno));
        if (queue != -1) mq_send(queue, "message", 8, 1);
        mq_close(queue);
    }
}

int main(int argc, char **argv) {
    wl_init();
    kind = argc > 1 ? argv[1] : "shm";
    is_gone = argc > 2 && !strcmp(argv[2], "gone");
    is_attached = argc > 2 && !is_gone;
    make();
    if (is_gone) {
        if (is("shm")) MUST(shmctl(id, IPC_RMID, NULL));
        if (is("sem")) MUST(semctl(id, 0, IPC_RMID));
        if (is("msg")) MUST(msgctl(id, IPC_RMID, NULL));
        if (is("mq")) MUST(mq_unlink("/queue"));
    }
    wl_serve(verify);
}

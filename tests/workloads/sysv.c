/* System V IPC: shared memory (attached by two, by nobody, removed, in parts, read-only, locked, large and nearly empty), semaphores (values,
 * who changed them last, what is undone when a process ends, somebody who waits), message queues (order, types, somebody who waits). */
#include "workload.h"
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define PAGE 4096L
#define KEY 0x74707200
enum { BOTH, ALONE, REMOVED, PARTS, READONLY, LOCKED, LARGE, SEGMENTS };
static const size_t sizes[SEGMENTS] = {5 * PAGE + 100, 3 * PAGE, 2 * PAGE, 6 * PAGE, PAGE, PAGE, 1UL << 30};
static int ids[SEGMENTS], again;
static unsigned char *at[SEGMENTS];
static struct shmid_ds shm_was[SEGMENTS];

static int sems, fresh, queue, empty;
static struct semid_ds sem_was;
static struct msqid_ds msg_was;
static pid_t helper, undoer;
static int to_undoer[2], from_undoer[2], from_helper[2];

struct message { long type; char text[6000]; };
#define MESSAGES 5
static const struct { long type; size_t length; } messages[MESSAGES] = {{7, 100}, {1, 0}, {7, 6000}, {3, 1}, {1L << 40, 4000}};

/* Values, and what the undoer has to undo. */
#define SEMS 8
static const int base[SEMS] = {0, 3, 32767, 100, 5, 0, 1, 9};
static const int undo[SEMS] = {0, 2, -32767, 0, -1, 32767, 1, 0};

static int op(int set, int number, int by, int flags) {
    struct sembuf b = {(unsigned short)number, (short)by, (short)flags};
    return semop(set, &b, 1);
}

/* Changes every semaphore with SEM_UNDO and back without it: then only what is to be undone is left. */
static void undoer_works(void) {
    for (int i = 0; i < SEMS; i++) {
        if (!undo[i]) continue;
        int value = semctl(sems, i, GETVAL);
        MUST(semctl(sems, i, SETVAL, undo[i] > 0 ? 32767 : 0));
        MUST(op(sems, i, -undo[i], SEM_UNDO));
        int now = semctl(sems, i, GETVAL);
        if (now != value) MUST(op(sems, i, value - now, 0));
    }
    MUST(write(from_undoer[1], "r", 1));
    char c;
    read(to_undoer[0], &c, 1);
    _exit(0);
}

static void start_undoer(void) {
    char c;
    undoer = MUST(fork());
    if (!undoer) undoer_works();
    MUST(read(from_undoer[0], &c, 1));
}

/* Has the first segment too, and two threads that wait: for a semaphore and for a message. */
static void *waits_for_semaphore(void *unused) {
    for (;;) {
        int r = op(sems, 0, -1, 0);
        dprintf(from_helper[1], "%c", r == 0 ? 's' : '!');
    }
    return unused;
}

static void *waits_for_message(void *unused) {
    for (;;) {
        struct message m;
        ssize_t r = msgrcv(empty, &m, sizeof m.text, 4, 0);
        dprintf(from_helper[1], "%c", r == 3 ? 'm' : '!');
    }
    return unused;
}

static void helper_works(void) {
    pthread_t thread;
    MUST(op(sems, 7, 4, 0)); /* it is the last to change this one */
    MUST(op(sems, 7, -4, 0));
    MUST0(pthread_create(&thread, NULL, waits_for_semaphore, NULL));
    MUST0(pthread_create(&thread, NULL, waits_for_message, NULL));
    dprintf(from_helper[1], "r");
    for (;;) {
        /* what the parent writes into the segment comes back changed */
        volatile unsigned char *bell = at[BOTH] + sizes[BOTH] - 1;
        while (*bell != 1) wl_sleep(0.001);
        *bell = 2;
    }
}

static void fill_queue(void) {
    for (int i = 0; i < MESSAGES; i++) {
        struct message m = {.type = messages[i].type};
        wl_fill(m.text, messages[i].length, 50 + (uint64_t)i);
        MUST(msgsnd(queue, &m, messages[i].length, IPC_NOWAIT));
    }
}

static void check_perm(const char *what, const struct ipc_perm *now, const struct ipc_perm *was) {
    CHECK(now->__key == was->__key && now->uid == was->uid && now->gid == was->gid && now->cuid == was->cuid && now->cgid == was->cgid && now->mode == was->mode,
          "%s: key %x, owner %u:%u, creator %u:%u, mode %o", what, now->__key, now->uid, now->gid, now->cuid, now->cgid, now->mode);
}

static void check_memory(void) {
    for (int i = 0; i < SEGMENTS; i++) {
        struct shmid_ds now;
        if (shmctl(ids[i], IPC_STAT, &now)) {
            wl_differs("segment %d: %s", i, strerror(errno));
            continue;
        }
        char what[32];
        sprintf(what, "segment %d", i);
        check_perm(what, &now.shm_perm, &shm_was[i].shm_perm);
        CHECK(now.shm_segsz == sizes[i], "%s has %zu bytes", what, now.shm_segsz);
        CHECK(now.shm_nattch == shm_was[i].shm_nattch, "%s is attached %lu times, was %lu", what, now.shm_nattch, shm_was[i].shm_nattch);
    }
    CHECK(wl_wrong(at[BOTH], sizes[BOTH] - 1, 1) == -1, "the common segment, byte %ld", wl_wrong(at[BOTH], sizes[BOTH] - 1, 1));
    volatile unsigned char *bell = at[BOTH] + sizes[BOTH] - 1;
    *bell = 1;
    for (int i = 0; i < 10000 && *bell != 2; i++) wl_sleep(0.001);
    CHECK(*bell == 2, "the other process has another segment");
    *bell = 0;
    unsigned char *p = MUST(shmat(ids[ALONE], NULL, SHM_RDONLY));
    CHECK(wl_wrong(p, sizes[ALONE], 2) == -1, "the segment that nobody has attached, byte %ld", wl_wrong(p, sizes[ALONE], 2));
    MUST(shmdt(p));
    CHECK(wl_wrong(at[REMOVED], sizes[REMOVED], 3) == -1, "the removed segment");
    CHECK(shmget(KEY + REMOVED, 0, 0) == again, "the key of the removed segment leads to %d", shmget(KEY + REMOVED, 0, 0));
    CHECK(wl_wrong(at[PARTS] + PAGE, (size_t)PAGE, 5) == -1, "the part that is left");
    CHECK(at[PARTS][4 * PAGE] == 44, "the part that is read-only");
    CHECK(msync(at[PARTS], (size_t)PAGE, MS_ASYNC) == -1 && msync(at[PARTS] + 3 * PAGE, (size_t)PAGE, MS_ASYNC) == -1, "a part that was unmapped is there");
    CHECK(mprotect(at[READONLY], (size_t)PAGE, PROT_READ | PROT_WRITE) == -1, "what was attached read-only can be written");
    CHECK(at[READONLY][9] == 99, "the read-only segment");
    CHECK(at[LARGE][0] == 7 && at[LARGE][sizes[LARGE] / 2] == 8 && at[LARGE][sizes[LARGE] - 1] == 9, "the large segment");
    /* shmdt(2) knows only what shmat(2) has made */
    MUST(shmdt(at[LOCKED]));
    struct shmid_ds now;
    MUST(shmctl(ids[LOCKED], IPC_STAT, &now));
    CHECK(now.shm_nattch == shm_was[LOCKED].shm_nattch - 1, "detached, and attached %lu times", now.shm_nattch);
    CHECK(shmat(ids[LOCKED], at[LOCKED], 0) == at[LOCKED], "attach again: %s", strerror(errno));
}

static void check_semaphores(void) {
    struct semid_ds now;
    MUST(semctl(sems, 0, IPC_STAT, &now));
    check_perm("semaphores", &now.sem_perm, &sem_was.sem_perm);
    CHECK(now.sem_nsems == SEMS && now.sem_otime, "%lu semaphores, last used %ld", now.sem_nsems, now.sem_otime);
    MUST(semctl(fresh, 0, IPC_STAT, &now));
    CHECK(now.sem_otime == 0 && semctl(fresh, 0, GETVAL) == 6, "the unused one: %ld, %d", now.sem_otime, semctl(fresh, 0, GETVAL));
    for (int i = 0; i < SEMS; i++) CHECK(semctl(sems, i, GETVAL) == base[i], "semaphore %d is %d", i, semctl(sems, i, GETVAL));
    CHECK(semctl(sems, 7, GETPID) == helper, "semaphore 7 was changed by %d, not %d", semctl(sems, 7, GETPID), helper);
    CHECK(semctl(sems, 0, GETNCNT) == 1, "%d wait for semaphore 0", semctl(sems, 0, GETNCNT));
    /* a process ends, and what it did is undone */
    MUST(write(to_undoer[1], "e", 1));
    MUST(waitpid(undoer, NULL, 0));
    for (int i = 0; i < SEMS; i++) {
        int wanted = base[i] + undo[i];
        wanted = wanted < 0 ? 0 : wanted > 32767 ? 32767 : wanted;
        CHECK(semctl(sems, i, GETVAL) == wanted, "undone, semaphore %d is %d instead of %d", i, semctl(sems, i, GETVAL), wanted);
        if (undo[i]) MUST(semctl(sems, i, SETVAL, base[i]));
    }
    start_undoer();
    char c = 0;
    MUST(op(sems, 0, 1, 0));
    MUST(read(from_helper[0], &c, 1));
    CHECK(c == 's', "who waits for a semaphore says %c", c);
    for (int i = 0; i < 10000 && semctl(sems, 0, GETNCNT) != 1; i++) wl_sleep(0.001);
}

static void check_messages(void) {
    struct msqid_ds now;
    MUST(msgctl(queue, IPC_STAT, &now));
    check_perm("messages", &now.msg_perm, &msg_was.msg_perm);
    CHECK(now.msg_qnum == MESSAGES && now.msg_qbytes == msg_was.msg_qbytes && now.__msg_cbytes == msg_was.__msg_cbytes, "%lu messages, %lu of %lu bytes",
          now.msg_qnum, now.__msg_cbytes, now.msg_qbytes);
    for (int i = 0; i < MESSAGES; i++) {
        struct message m;
        ssize_t n = msgrcv(queue, &m, sizeof m.text, 0, IPC_NOWAIT);
        CHECK(n == (ssize_t)messages[i].length && m.type == messages[i].type, "message %d: type %ld, %zd bytes", i, m.type, n);
        CHECK(n < 0 || wl_wrong(m.text, (size_t)n, 50 + (uint64_t)i) == -1, "message %d: other text", i);
    }
    fill_queue();
    struct message m = {.type = 4};
    MUST(msgsnd(empty, &m, 3, 0));
    char c = 0;
    MUST(read(from_helper[0], &c, 1));
    CHECK(c == 'm', "who waits for a message says %c", c);
}

static void verify(void) {
    check_memory();
    check_semaphores();
    check_messages();
}

static void make_memory(void) {
    for (int i = 0; i < SEGMENTS; i++) {
        ids[i] = MUST(shmget(i == LARGE ? IPC_PRIVATE : KEY + i, sizes[i], IPC_CREAT | IPC_EXCL | 0640));
        at[i] = MUST(shmat(ids[i], NULL, i == READONLY ? SHM_RDONLY : 0));
    }
    wl_fill(at[BOTH], sizes[BOTH] - 1, 1);
    wl_fill(at[ALONE], sizes[ALONE], 2);
    MUST(shmdt(at[ALONE]));
    wl_fill(at[REMOVED], sizes[REMOVED], 3);
    MUST(shmctl(ids[REMOVED], IPC_RMID, NULL));
    again = MUST(shmget(KEY + REMOVED, PAGE, IPC_CREAT | IPC_EXCL | 0600));
    wl_fill(at[PARTS] + PAGE, (size_t)PAGE, 5);
    at[PARTS][4 * PAGE] = 44;
    MUST(munmap(at[PARTS], (size_t)PAGE));
    MUST(munmap(at[PARTS] + 3 * PAGE, (size_t)PAGE));
    MUST(mprotect(at[PARTS] + 4 * PAGE, (size_t)PAGE, PROT_READ));
    MUST(madvise(at[PARTS] + PAGE, (size_t)PAGE, MADV_DONTDUMP));
    unsigned char *w = MUST(shmat(ids[READONLY], NULL, 0));
    w[9] = 99;
    MUST(shmdt(w));
    MUST(shmctl(ids[LOCKED], SHM_LOCK, NULL));
    at[LARGE][0] = 7, at[LARGE][sizes[LARGE] / 2] = 8, at[LARGE][sizes[LARGE] - 1] = 9;
    struct shmid_ds ds;
    MUST(shmctl(ids[ALONE], IPC_STAT, &ds));
    ds.shm_perm.uid = 1234, ds.shm_perm.gid = 77, ds.shm_perm.mode = 0604;
    MUST(shmctl(ids[ALONE], IPC_SET, &ds));
}

int main(void) {
    wl_init();
    MUST(pipe2(to_undoer, O_CLOEXEC));
    MUST(pipe2(from_undoer, O_CLOEXEC));
    MUST(pipe2(from_helper, O_CLOEXEC));
    make_memory();
    /* an id that is not the first of its place */
    int first = MUST(semget(KEY, 1, IPC_CREAT | 0600));
    MUST(semctl(first, 0, IPC_RMID));
    sems = MUST(semget(KEY, SEMS, IPC_CREAT | IPC_EXCL | 0660));
    for (int i = 0; i < SEMS; i++) MUST(semctl(sems, i, SETVAL, base[i]));
    fresh = MUST(semget(IPC_PRIVATE, 1, 0600));
    MUST(semctl(fresh, 0, SETVAL, 6));
    MUST(setresuid(-1, 55, -1)); /* somebody else has made the queue */
    queue = MUST(msgget(KEY, IPC_CREAT | IPC_EXCL | 0666));
    MUST(setresuid(-1, 0, -1));
    empty = MUST(msgget(IPC_PRIVATE, 0600));
    fill_queue();
    MUST(msgctl(queue, IPC_STAT, &msg_was));
    msg_was.msg_qbytes = 12000;
    MUST(msgctl(queue, IPC_SET, &msg_was));
    helper = MUST(fork());
    if (!helper) helper_works();
    char c;
    MUST(read(from_helper[0], &c, 1));
    start_undoer();
    for (int i = 0; i < 10000 && semctl(sems, 0, GETNCNT) != 1; i++) wl_sleep(0.001);
    for (int i = 0; i < SEGMENTS; i++) MUST(shmctl(ids[i], IPC_STAT, &shm_was[i]));
    MUST(semctl(sems, 0, IPC_STAT, &sem_was));
    MUST(msgctl(queue, IPC_STAT, &msg_was));
    wl_serve(verify);
}

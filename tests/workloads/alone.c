/* A program that would notice another process with its memory and descriptors: it counts SIGCHLD, its children and what wait(2) says,
 * and sees whether the end of a pipe and of a socket comes at once. With SIGUSR2 it executes itself again; then it says AGAIN. */
#include "workload.h"
#include <poll.h>
#include <sys/socket.h>

enum { BYTES = 96 << 20 };
static volatile sig_atomic_t chld;
static unsigned char *heap;
static pid_t child;

static void on_chld(int signal) { (void)signal, chld++; }

static void on_usr2(int signal) {
    (void)signal;
    execl("/proc/self/exe", "alone", "again", NULL);
    _exit(9);
}

static void ends_at_once(int reader, int writer, const char *what) {
    MUST(close(writer));
    struct pollfd p = {reader, POLLIN, 0};
    char byte;
    CHECK(poll(&p, 1, 3000) == 1 && read(reader, &byte, 1) == 0, "the end of a %s does not come", what);
    MUST(close(reader));
}

static int ends[2], sockets[2];

static void open_ends(void) {
    MUST(pipe(ends));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
}

static void verify(void) {
    /* opened before the checkpoint: whoever was copied then has them too */
    ends_at_once(ends[0], ends[1], "pipe");
    ends_at_once(sockets[0], sockets[1], "socket");
    open_ends();
    CHECK(chld == 0, "%d SIGCHLD", (int)chld);
    int status;
    pid_t got = waitpid(-1, &status, WNOHANG | __WALL);
    CHECK(got == 0, "wait says %d (%s)", got, got < 0 ? strerror(errno) : "a child");
    char *children = wl_slurp("/proc/thread-self/children", NULL);
    CHECK(atoi(children) == child, "another first child: %s", children);
    free(children);
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", child, child);
    children = wl_slurp(path, NULL);
    CHECK(atoi(children) > child && getpgid(atoi(children)) == child, "the child's group is not whole: '%s'", children);
    free(children);
    for (long i = 0; i < BYTES; i += 4096 * 7) {
        uint64_t word;
        memcpy(&word, heap + i, 8);
        CHECK(word == (uint64_t)i * 31 + 7, "byte %ld", i);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "again")) {
        dprintf(1, "AGAIN\n");
        for (;;) pause();
    }
    wl_init();
    struct sigaction action = {.sa_handler = on_chld, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGCHLD, &action, NULL));
    action.sa_handler = on_usr2;
    MUST(sigaction(SIGUSR2, &action, NULL));
    child = MUST(fork());
    if (!child) {
        /* two in a group of their own */
        MUST(setpgid(0, 0));
        MUST(fork());
        for (;;) pause();
    }
    open_ends();
    heap = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (long i = 0; i < BYTES; i += 4096) {
        uint64_t word = (uint64_t)i * 31 + 7;
        memcpy(heap + i, &word, 8);
    }
    wl_serve(verify);
}

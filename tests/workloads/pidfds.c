/* pidfds: of the program itself, a child, a zombie, a thread; in epoll; what can be asked and sent through them. */
#include "workload.h"
#include <poll.h>
#include <sys/epoll.h>

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif
#ifndef P_PIDFD
#define P_PIDFD 3
#endif
static int self, of_child, of_zombie, of_thread, set;
static pid_t child, zombie, tid;
static sem_t ready;

static int open_pidfd(pid_t pid, unsigned flags) { return (int)syscall(SYS_pidfd_open, pid, flags); }
static int send(int fd, int signal) { return (int)syscall(SYS_pidfd_send_signal, fd, signal, NULL, 0); }

static int pid_of(int fd) {
    char path[64];
    sprintf(path, "/proc/self/fdinfo/%d", fd);
    char *text = wl_status_of(path, "Pid");
    int pid = atoi(text);
    free(text);
    return pid;
}

static int is_ready(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1 && p.revents & POLLIN;
}

static void *run_thread(void *unused) {
    (void)unused;
    tid = gettid();
    sem_post(&ready);
    for (;;) pause();
    return NULL;
}

static void verify(void) {
    CHECK(pid_of(self) == getpid(), "pidfd of itself: %d", pid_of(self));
    CHECK(pid_of(of_child) == child, "pidfd of a child: %d instead of %d", pid_of(of_child), child);
    CHECK(pid_of(of_zombie) == zombie, "pidfd of a zombie: %d instead of %d", pid_of(of_zombie), zombie);
    CHECK(!is_ready(self) && !is_ready(of_child), "pidfd: a living process has ended");
    CHECK(is_ready(of_zombie), "pidfd: a zombie has not ended");
    if (of_thread >= 0) {
        CHECK(pid_of(of_thread) == tid, "pidfd of a thread: %d instead of %d", pid_of(of_thread), tid);
        CHECK(!is_ready(of_thread), "pidfd: a living thread has ended");
    }
    CHECK(send(of_child, 0) == 0, "pidfd: no signal to a child: %s", strerror(errno));
    siginfo_t info = {0};
    CHECK(waitid((idtype_t)P_PIDFD, (id_t)of_zombie, &info, WEXITED | WNOWAIT | WNOHANG) == 0 && info.si_pid == zombie && info.si_status == 7,
          "pidfd: waitid: %s, process %d, status %d", strerror(errno), info.si_pid, info.si_status);
    CHECK(fcntl(of_child, F_GETFL) & O_NONBLOCK, "pidfd: blocks");
    CHECK(fcntl(of_child, F_GETFD) & FD_CLOEXEC, "pidfd: is inherited");
    struct epoll_event e[4];
    int n = epoll_wait(set, e, 4, 0);
    CHECK(n == 1 && e[0].data.u32 == 9, "epoll reports %d pidfds", n);
}

int main(void) {
    wl_init();
    sem_init(&ready, 0, 0);
    child = MUST(fork());
    if (!child)
        for (;;) pause();
    zombie = MUST(fork());
    if (!zombie) _exit(7);
    siginfo_t info;
    MUST(waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT));
    pthread_t thread;
    MUST0(pthread_create(&thread, NULL, run_thread, NULL));
    sem_wait(&ready);
    self = MUST(open_pidfd(getpid(), 0));
    of_child = MUST(open_pidfd(child, O_NONBLOCK));
    of_zombie = MUST(open_pidfd(zombie, 0));
    of_thread = open_pidfd(tid, PIDFD_THREAD); /* Linux 6.9 */
    set = MUST(epoll_create1(0));
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = 8};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, of_child, &e));
    e.data.u32 = 9;
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, of_zombie, &e));
    wl_serve(verify);
}

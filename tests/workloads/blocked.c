/* System calls that wait: none of them may come back by itself, with EINTR or with anything else, and each must still work when what it
 * waits for happens. One thread a call. */
#include "workload.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/un.h>

struct call {
    const char *name;
    long (*wait)(struct call *);
    void (*poke)(struct call *); /* make it return; NULL: it must not return at all */
    long expected;
    int fds[2];
    int word;
    pid_t child;
    pthread_t thread;
    pid_t tid;
    long result;
    int error;
    sem_t done, again;
};

static void byte(struct call *c) { MUST(write(c->fds[1], "x", 1)); }
static void drain(struct call *c) { char b; MUST(read(c->fds[0], &b, 1)); }

static long do_nanosleep(struct call *c) { (void)c; struct timespec t = {86400, 0}; return nanosleep(&t, NULL); }
static long do_clock_nanosleep(struct call *c) {
    (void)c;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += 86400;
    return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}
static long do_read(struct call *c) { char b; return read(c->fds[0], &b, 1); }
static long do_write(struct call *c) { return write(c->fds[1], "y", 1); }
static long do_poll(struct call *c) {
    struct pollfd p = {c->fds[0], POLLIN, 0};
    long r = poll(&p, 1, -1);
    if (r == 1) drain(c);
    return r;
}
static long do_poll_timeout(struct call *c) {
    struct pollfd p = {c->fds[0], POLLIN, 0};
    long r = poll(&p, 1, 86400000);
    if (r == 1) drain(c);
    return r;
}
static long do_ppoll(struct call *c) {
    struct pollfd p = {c->fds[0], POLLIN, 0};
    struct timespec t = {86400, 0};
    sigset_t set;
    sigfillset(&set);
    long r = ppoll(&p, 1, &t, &set);
    if (r == 1) drain(c);
    return r;
}
static long do_select(struct call *c) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(c->fds[0], &set);
    struct timeval t = {86400, 0};
    long r = select(c->fds[0] + 1, &set, NULL, NULL, &t);
    if (r == 1) drain(c);
    return r;
}
static long do_epoll_wait(struct call *c) {
    struct epoll_event e;
    long r = epoll_wait(c->word, &e, 1, -1);
    if (r == 1) drain(c);
    return r;
}
static long do_epoll_timeout(struct call *c) {
    struct epoll_event e;
    long r = epoll_wait(c->word, &e, 1, 86400000);
    if (r == 1) drain(c);
    return r;
}
static long do_eventfd(struct call *c) { uint64_t v = 0; long r = read(c->fds[0], &v, 8); return r == 8 ? (long)v : r; }
static void poke_eventfd(struct call *c) { uint64_t v = 5; MUST(write(c->fds[0], &v, 8)); }
static long do_recv(struct call *c) { char b[8]; return recv(c->fds[0], b, sizeof b, 0); }
/* With SO_RCVTIMEO a stop ends these calls with EINTR (signal(7)). */
static long do_recv_timeout(struct call *c) { return do_recv(c); }
static long do_read_timeout(struct call *c) { return do_read(c); }
static long do_recvmsg(struct call *c) {
    char b[8];
    struct iovec v = {b, sizeof b};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    return recvmsg(c->fds[0], &m, 0);
}
static long do_accept(struct call *c) {
    int fd = accept(c->fds[0], NULL, NULL);
    if (fd >= 0) close(fd);
    return fd >= 0 ? 1 : -1;
}
static long do_accept_timeout(struct call *c) { return do_accept(c); }
static void poke_accept(struct call *c) {
    struct sockaddr_un a;
    socklen_t n = sizeof a;
    MUST(getsockname(c->fds[0], (void *)&a, &n));
    int fd = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(connect(fd, (void *)&a, n));
    close(fd);
}
static long do_futex(struct call *c) { return syscall(SYS_futex, &c->word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0); }
static long do_futex_timeout(struct call *c) {
    struct timespec t = {86400, 0};
    return syscall(SYS_futex, &c->word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
}
static long do_futex_absolute(struct call *c) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += 86400;
    return syscall(SYS_futex, &c->word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, NULL, FUTEX_BITSET_MATCH_ANY);
}
/* The wake-up is repeated until it met the waiter: the thread may not be back in its call yet. */
static void poke_futex(struct call *c) {
    while (syscall(SYS_futex, &c->word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) == 0) wl_sleep(0.001);
}
static long do_sigwait(struct call *c) {
    (void)c;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 7);
    siginfo_t info;
    struct timespec t = {86400, 0};
    long r = sigtimedwait(&set, &info, &t);
    return r == SIGRTMIN + 7 ? info.si_value.sival_int : r;
}
static void poke_sigwait(struct call *c) { MUST0(pthread_sigqueue(c->thread, SIGRTMIN + 7, (union sigval){.sival_int = 31})); }
static long do_sigsuspend(struct call *c) { (void)c; sigset_t set; sigfillset(&set); return sigsuspend(&set); }
static long do_waitpid(struct call *c) {
    int status = 0;
    pid_t child = c->child;
    long r = waitpid(child, &status, 0);
    return r == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
static void new_child(struct call *c) {
    pid_t child = MUST(fork());
    if (!child) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN + 8);
        int signal;
        sigwait(&set, &signal);
        _exit(17);
    }
    c->child = child;
}
static void poke_waitpid(struct call *c) { MUST(kill(c->child, SIGRTMIN + 8)); }
static long do_short_sleep(struct call *c) {
    (void)c;
    /* ends by itself: it must not end early, nor fail */
    double before = wl_now(CLOCK_MONOTONIC);
    struct timespec t = {0, 30000000};
    int r = nanosleep(&t, NULL);
    double took = wl_now(CLOCK_MONOTONIC) - before;
    CHECK(r == 0, "short nanosleep: %s", strerror(errno));
    CHECK(took >= 0.03, "short nanosleep took %f s", took);
    r = poll(NULL, 0, 30);
    CHECK(r == 0, "short poll: %s", strerror(errno));
    struct timespec real;
    clock_gettime(CLOCK_REALTIME, &real);
    real.tv_nsec += 30000000;
    if (real.tv_nsec >= 1000000000) real.tv_sec++, real.tv_nsec -= 1000000000;
    sem_t never;
    sem_init(&never, 0, 0);
    r = sem_timedwait(&never, &real);
    CHECK(r == -1 && errno == ETIMEDOUT, "short sem_timedwait: %s", strerror(errno));
    return -2;
}

static struct call calls[] = {
    {.name = "nanosleep", .wait = do_nanosleep},
    {.name = "clock_nanosleep", .wait = do_clock_nanosleep},
    {.name = "read(pipe)", .wait = do_read, .poke = byte, .expected = 1},
    {.name = "write(full pipe)", .wait = do_write, .expected = 1},
    {.name = "poll", .wait = do_poll, .poke = byte, .expected = 1},
    {.name = "poll(timeout)", .wait = do_poll_timeout, .poke = byte, .expected = 1},
    {.name = "ppoll", .wait = do_ppoll, .poke = byte, .expected = 1},
    {.name = "select", .wait = do_select, .poke = byte, .expected = 1},
    {.name = "epoll_wait", .wait = do_epoll_wait, .poke = byte, .expected = 1},
    {.name = "epoll_wait(timeout)", .wait = do_epoll_timeout, .poke = byte, .expected = 1},
    {.name = "read(eventfd)", .wait = do_eventfd, .poke = poke_eventfd, .expected = 5},
    {.name = "recv", .wait = do_recv, .poke = byte, .expected = 1},
    {.name = "recvmsg", .wait = do_recvmsg, .poke = byte, .expected = 1},
    {.name = "accept", .wait = do_accept, .poke = poke_accept, .expected = 1},
    {.name = "recv(SO_RCVTIMEO)", .wait = do_recv_timeout, .poke = byte, .expected = 1},
    {.name = "read(SO_RCVTIMEO)", .wait = do_read_timeout, .poke = byte, .expected = 1},
    {.name = "accept(SO_RCVTIMEO)", .wait = do_accept_timeout, .poke = poke_accept, .expected = 1},
    {.name = "futex", .wait = do_futex, .poke = poke_futex, .expected = 0},
    {.name = "futex(timeout)", .wait = do_futex_timeout, .poke = poke_futex, .expected = 0},
    {.name = "futex(absolute)", .wait = do_futex_absolute, .poke = poke_futex, .expected = 0},
    {.name = "sigtimedwait", .wait = do_sigwait, .poke = poke_sigwait, .expected = 31},
    {.name = "sigsuspend", .wait = do_sigsuspend},
    {.name = "waitpid", .wait = do_waitpid, .poke = poke_waitpid, .expected = 17},
    {.name = "short sleeps", .wait = do_short_sleep},
};
#define CALLS (sizeof calls / sizeof *calls)

static void *run(void *argument) {
    struct call *c = argument;
    c->tid = (pid_t)syscall(SYS_gettid);
    for (;;) {
        errno = 0;
        long r = c->wait(c);
        if (r == -2) continue;
        c->result = r;
        c->error = errno;
        sem_post(&c->done);
        sem_wait(&c->again);
    }
    return NULL;
}

/* A pipe from which one byte at most can be read before a write of one byte goes through. */
static void fill_pipe(struct call *c) {
    MUST(pipe(c->fds));
    int flags = MUST(fcntl(c->fds[1], F_GETFL));
    MUST(fcntl(c->fds[1], F_SETFL, flags | O_NONBLOCK));
    while (write(c->fds[1], "zzzzzzzz", 8) > 0 || write(c->fds[1], "z", 1) > 0) {}
    MUST(fcntl(c->fds[1], F_SETFL, flags));
}
static void poke_full(struct call *c) { static char page[4096]; MUST(read(c->fds[0], page, sizeof page)); }
static void refill(struct call *c) {
    int flags = MUST(fcntl(c->fds[1], F_GETFL));
    MUST(fcntl(c->fds[1], F_SETFL, flags | O_NONBLOCK));
    while (write(c->fds[1], "zzzzzzzz", 8) > 0 || write(c->fds[1], "z", 1) > 0) {}
    MUST(fcntl(c->fds[1], F_SETFL, flags));
}

static void prepare(struct call *c) {
    sem_init(&c->done, 0, 0);
    sem_init(&c->again, 0, 0);
    if (c->wait == do_write) {
        fill_pipe(c);
        c->poke = poke_full;
    } else if (c->wait == do_recv || c->wait == do_recvmsg || c->wait == do_recv_timeout || c->wait == do_read_timeout) {
        MUST(socketpair(AF_UNIX, c->wait != do_recvmsg ? SOCK_STREAM : SOCK_SEQPACKET, 0, c->fds));
    } else if (c->wait == do_eventfd) {
        c->fds[0] = MUST(eventfd(0, 0));
    } else if (c->wait == do_accept || c->wait == do_accept_timeout) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        sprintf(a.sun_path, "/wl/blocked%zu.sock", (size_t)(c - calls));
        unlink(a.sun_path);
        c->fds[0] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
        MUST(bind(c->fds[0], (void *)&a, sizeof a));
        MUST(listen(c->fds[0], 5));
    } else if (c->wait == do_waitpid) {
        new_child(c);
    } else {
        MUST(pipe(c->fds));
    }
    struct timeval day = {86400, 0};
    if (strstr(c->name, "SO_RCVTIMEO")) MUST(setsockopt(c->fds[0], SOL_SOCKET, SO_RCVTIMEO, &day, sizeof day));
    if (c->wait == do_epoll_wait || c->wait == do_epoll_timeout) {
        c->word = MUST(epoll_create1(0));
        struct epoll_event e = {.events = EPOLLIN};
        MUST(epoll_ctl(c->word, EPOLL_CTL_ADD, c->fds[0], &e));
    }
}

static void verify(void) {
    for (size_t i = 0; i < CALLS; i++) {
        struct call *c = &calls[i];
        if (sem_trywait(&c->done) == 0) {
            wl_differs("%s came back by itself: %ld, %s", c->name, c->result, strerror(c->error));
            sem_post(&c->again);
            continue;
        }
        if (!c->poke) continue;
        c->poke(c);
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_sec += 10;
        if (sem_timedwait(&c->done, &t) != 0) {
            wl_differs("%s did not come back", c->name);
            continue;
        }
        CHECK(c->result == c->expected, "%s returned %ld, %s", c->name, c->result, strerror(c->error));
        if (c->wait == do_waitpid) new_child(c);
        if (c->wait == do_write) refill(c);
        sem_post(&c->again);
    }
    wl_sleep(0.1); /* so that all are waiting again when the next checkpoint comes */
}

int main(void) {
    wl_init();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 7);
    sigaddset(&set, SIGRTMIN + 8);
    MUST0(pthread_sigmask(SIG_BLOCK, &set, NULL));
    for (size_t i = 0; i < CALLS; i++) prepare(&calls[i]);
    for (size_t i = 0; i < CALLS; i++) MUST0(pthread_create(&calls[i].thread, NULL, run, &calls[i]));
    wl_sleep(0.2);
    wl_serve(verify);
}

/* eventfd counters and epoll sets: what is watched, with which flags and data; one-shot, edge-triggered, nested, and waiting events. */
#include "workload.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

static int counter, semaphore, nonblocking, shared_copy, set, outer, quiet[2], ready[2], edge[2], once[2], pair[2];
static char *watched[2];

/* The lines of an epoll fd's fdinfo, sorted, without inode and device. */
static char *watch_list(int fd) {
    char path[64], *lines[64], *save = NULL;
    int n = 0;
    sprintf(path, "/proc/self/fdinfo/%d", fd);
    char *text = wl_slurp(path, NULL);
    for (char *line = strtok_r(text, "\n", &save); line && n < 64; line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, "tfd:", 4)) continue;
        char *end = strstr(line, " pos:");
        if (end) *end = 0;
        /* a one-shot that was used up has no events at all; epoll_ctl cannot say that, it always adds EPOLLERR and EPOLLHUP */
        char *spent = strstr(line, "events: 40000018");
        if (spent) memcpy(spent, "events: 40000000", 16);
        lines[n++] = line;
    }
    for (int i = 0; i < n; i++)
        for (int j = i + 1; j < n; j++)
            if (strcmp(lines[i], lines[j]) > 0) {
                char *t = lines[i];
                lines[i] = lines[j], lines[j] = t;
            }
    char *out = calloc(1, 8192);
    for (int i = 0; i < n; i++) strcat(strcat(out, lines[i]), "|");
    free(text);
    return out;
}

static int wait_for(int fd, struct epoll_event *events) { return epoll_wait(fd, events, 16, 0); }

static int has(struct epoll_event *events, int n, uint64_t data, uint32_t what) {
    for (int i = 0; i < n; i++)
        if (events[i].data.u64 == data) return events[i].events == what;
    return 0;
}

static int mentions(struct epoll_event *events, int n, uint64_t data) {
    for (int i = 0; i < n; i++)
        if (events[i].data.u64 == data) return 1;
    return 0;
}

static void watch(int in, int fd, uint32_t what, uint64_t data) {
    struct epoll_event e = {.events = what, .data.u64 = data};
    MUST(epoll_ctl(in, EPOLL_CTL_ADD, fd, &e));
}

static void verify(void) {
    for (int i = 0; i < 2; i++) {
        char *now = watch_list(i ? outer : set);
        size_t same = 0;
        while (now[same] && now[same] == watched[i][same]) same++;
        size_t from = same > 60 ? same - 60 : 0;
        CHECK(!strcmp(now, watched[i]), "epoll %d watches ..%.100s.., did watch ..%.100s..", i, now + from, watched[i] + from);
        free(now);
    }
    struct epoll_event events[16];
    int n = wait_for(set, events);
    CHECK(has(events, n, 0x1111222233334444, EPOLLIN), "epoll: the level-triggered pipe is not reported with its data");
    CHECK(!mentions(events, n, 2), "epoll: the quiet pipe is reported");
    CHECK(!mentions(events, n, 4), "epoll: a one-shot that was used up is reported");
    CHECK(has(events, n, 5, EPOLLOUT), "epoll: the socket is not writable");
    n = wait_for(set, events);
    CHECK(has(events, n, 0x1111222233334444, EPOLLIN), "epoll: the level-triggered pipe is reported only once");
    CHECK(!mentions(events, n, 3), "epoll: the edge-triggered pipe is reported twice");
    n = wait_for(outer, events);
    CHECK(has(events, n, 99, EPOLLIN), "epoll: the nested set is not ready");
    MUST(write(edge[1], "x", 1));
    MUST(write(quiet[1], "x", 1));
    n = wait_for(set, events);
    CHECK(has(events, n, 3, EPOLLIN), "epoll: no edge");
    CHECK(has(events, n, 2, EPOLLIN), "epoll: no event for what became ready");
    char b[8];
    MUST(read(quiet[0], b, 8));
    struct epoll_event e = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 4};
    MUST(epoll_ctl(set, EPOLL_CTL_MOD, once[0], &e));
    n = wait_for(set, events);
    CHECK(has(events, n, 4, EPOLLIN), "epoll: the one-shot does not fire when it is armed again");
    /* the edge is spent: leave it as the next round expects it */

    uint64_t v = 0;
    MUST(read(counter, &v, 8));
    CHECK(v == 0xfedcba98765, "eventfd: %lx", v);
    MUST(write(counter, &v, 8));
    v = 0;
    MUST(read(semaphore, &v, 8));
    CHECK(v == 1, "eventfd semaphore: %lu", v);
    MUST(write(semaphore, &v, 8));
    int count = 0;
    uint64_t one = 1;
    MUST(fcntl(semaphore, F_SETFL, O_RDWR | O_NONBLOCK));
    while (read(semaphore, &v, 8) == 8) count++;
    MUST(fcntl(semaphore, F_SETFL, O_RDWR));
    CHECK(count == 12, "eventfd semaphore: counts %d", count);
    for (int i = 0; i < 12; i++) MUST(write(semaphore, &one, 8));
    CHECK(read(nonblocking, &v, 8) == -1 && errno == EAGAIN, "eventfd: an empty one can be read");
    v = 6;
    MUST(write(shared_copy, &v, 8));
    v = 0;
    MUST(read(nonblocking, &v, 8));
    CHECK(v == 6, "eventfd: the dup is another one");
}

int main(void) {
    wl_init();
    counter = MUST(eventfd(0, EFD_CLOEXEC));
    uint64_t v = 0xfedcba98765;
    MUST(write(counter, &v, 8));
    semaphore = MUST(eventfd(12, EFD_SEMAPHORE));
    nonblocking = MUST(eventfd(0, EFD_NONBLOCK));
    shared_copy = MUST(dup(nonblocking));
    MUST(pipe(quiet));
    MUST(pipe(ready));
    MUST(pipe(edge));
    MUST(pipe(once));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(write(ready[1], "r", 1));
    MUST(write(edge[1], "e", 1));
    MUST(write(once[1], "o", 1));
    set = MUST(epoll_create1(EPOLL_CLOEXEC));
    outer = MUST(epoll_create1(0));
    watch(set, ready[0], EPOLLIN, 0x1111222233334444);
    watch(set, quiet[0], EPOLLIN | EPOLLPRI, 2);
    watch(set, edge[0], EPOLLIN | EPOLLET | EPOLLRDHUP, 3);
    watch(set, once[0], EPOLLIN | EPOLLONESHOT, 4);
    watch(set, pair[0], EPOLLOUT, 5);
    watch(set, counter, 0, 6);
    watch(outer, set, EPOLLIN, 99);
    struct epoll_event events[16];
    MUST(wait_for(set, events));
    watched[0] = watch_list(set);
    watched[1] = watch_list(outer);
    wl_serve(verify);
}

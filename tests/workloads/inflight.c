/* What is in flight in unix sockets: open files, also ones that nobody else has, sockets in each other's queues, credentials, datagrams of
 * several senders, connections that wait to be accepted. */
#include "workload.h"
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MOST 8

static int stream[2], packets[2], ring[2], said[2], server, letters[3], listener, callers[3], child_says[2];
static pid_t child;
static char plain[3000];

/* Abstract names keep the file system out of it. */
static socklen_t name(struct sockaddr_un *a, const char *text) {
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    strcpy(a->sun_path + 1, text);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(text));
}

static void bound(int fd, const char *text) {
    struct sockaddr_un a;
    socklen_t n = name(&a, text);
    MUST(bind(fd, (void *)&a, n));
}

static void send_with(int to, const void *data, size_t length, const int *fds, int count) {
    union { char room[CMSG_SPACE(MOST * sizeof(int))]; struct cmsghdr align; } control;
    memset(&control, 0, sizeof control);
    struct iovec part = {(void *)data, length};
    struct msghdr head = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        head.msg_control = control.room;
        head.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&head);
        c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(c), fds, (size_t)count * sizeof(int));
    }
    ssize_t n = MUST(sendmsg(to, &head, 0));
    CHECK(n == (ssize_t)length, "sent %zd of %zu bytes", n, length);
}

/* How many descriptors came; `who` gets the sender where that is shown. */
static int receive(const char *what, int from, const void *data, size_t length, int *fds, struct ucred *who) {
    union { char room[512]; struct cmsghdr align; } control;
    static char bytes[70000];
    struct iovec part = {bytes, length};
    struct msghdr head = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(from, &head, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    CHECK(n == (ssize_t)length, "%s: received %zd of %zu bytes: %s", what, n, length, n < 0 ? strerror(errno) : "");
    CHECK(n <= 0 || !memcmp(bytes, data, (size_t)n), "%s: content", what);
    CHECK(!(head.msg_flags & MSG_CTRUNC), "%s: more came than fits", what);
    int count = 0;
    if (n < 0) return 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&head); c; c = CMSG_NXTHDR(&head, c)) {
        if (c->cmsg_type == SCM_RIGHTS) {
            count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            if (count > MOST) count = MOST;
            memcpy(fds, CMSG_DATA(c), (size_t)count * sizeof(int));
        } else if (c->cmsg_type == SCM_CREDENTIALS && who) {
            memcpy(who, CMSG_DATA(c), sizeof *who);
        }
    }
    return count;
}

static void close_all(const int *fds, int count) {
    for (int i = 0; i < count; i++) close(fds[i]);
}

/* A file whose only descriptor is in flight, an eventfd, an epoll instance, and one that this program has as well. */
static void fill_stream(void) {
    int fds[4];
    fds[0] = MUST(open("/wl/in-flight", O_RDWR | O_CREAT | O_TRUNC, 0600));
    MUST(pwrite(fds[0], "content", 7, 0));
    MUST(lseek(fds[0], 3, SEEK_SET));
    fds[1] = MUST(eventfd(7, EFD_NONBLOCK));
    fds[2] = MUST(epoll_create1(0));
    fds[3] = said[0];
    MUST(send(stream[0], plain, sizeof plain, 0));
    send_with(stream[0], "bringing", 8, fds, 4);
    MUST(send(stream[0], "behind", 6, 0));
    close_all(fds, 3);
}

static void check_stream(void) {
    int fds[MOST];
    CHECK(receive("stream, plain", stream[1], plain, sizeof plain, fds, NULL) == 0, "files come with bytes before them");
    int count = receive("stream, files", stream[1], "bringing", 8, fds, NULL);
    CHECK(count == 4, "%d files came of 4", count);
    if (count == 4) {
        char text[8] = "";
        CHECK(read(fds[0], text, 8) == 4 && !memcmp(text, "tent", 4), "the file in flight: %.8s", text);
        eventfd_t value = 0;
        CHECK(eventfd_read(fds[1], &value) == 0 && value == 7, "the eventfd in flight: %llu", (unsigned long long)value);
        struct epoll_event event = {EPOLLIN, {.fd = 1}};
        MUST(eventfd_write(fds[1], 1));
        MUST(epoll_ctl(fds[2], EPOLL_CTL_ADD, fds[1], &event));
        CHECK(epoll_wait(fds[2], &event, 1, 1000) == 1, "the epoll instance in flight");
        /* The same open file as ours: what is changed of one is changed of the other. */
        MUST(fcntl(fds[3], F_SETFL, O_NONBLOCK));
        CHECK(fcntl(said[0], F_GETFL) & O_NONBLOCK, "the socket in flight is another one");
        MUST(fcntl(said[0], F_SETFL, 0));
    }
    close_all(fds, count);
    CHECK(receive("stream, behind", stream[1], "behind", 6, fds, NULL) == 0, "files behind");
}

/* Each end of a pair in the other's queue, and the reading end of a pipe that has something in it. */
static void fill_ring(void) {
    int both[2] = {ring[0], ring[1]}, pipes[2];
    send_with(ring[0], "a", 1, &both[0], 1);
    send_with(ring[0], "b", 1, both, 2);
    send_with(ring[1], "c", 1, &both[1], 1);
    MUST(pipe(pipes));
    MUST(write(pipes[1], "drop", 4));
    send_with(packets[0], "packet", 6, pipes, 2);
    send_with(packets[0], "", 0, NULL, 0);
    send_with(packets[0], "last", 4, &packets[1], 1);
    close_all(pipes, 2);
}

static void check_ring(void) {
    int a[MOST], b[MOST], c[MOST];
    int got[3] = {receive("ring a", ring[1], "a", 1, a, NULL), receive("ring b", ring[1], "b", 1, b, NULL),
                  receive("ring c", ring[0], "c", 1, c, NULL)};
    CHECK(got[0] == 1 && got[1] == 2 && got[2] == 1, "ring: %d, %d, %d files", got[0], got[1], got[2]);
    if (got[1] == 2) {
        MUST(send(b[0], "through", 7, 0));
        receive("through the ring", b[1], "through", 7, a + got[0], NULL);
    }
    close_all(a, got[0]), close_all(b, got[1]), close_all(c, got[2]);
    int pipes[MOST], own[MOST];
    int count = receive("packet", packets[1], "packet", 6, pipes, NULL);
    char text[8] = "";
    CHECK(count == 2 && read(pipes[0], text, 8) == 4 && !memcmp(text, "drop", 4), "pipe in flight: %d ends, %.8s", count, text);
    close_all(pipes, count);
    receive("empty packet", packets[1], "", 0, own, NULL);
    count = receive("last packet", packets[1], "last", 4, own, NULL);
    CHECK(count == 1, "%d sockets with the last packet", count);
    close_all(own, count);
}

static void fill_said(void) {
    MUST(send(said[0], "me", 2, 0));
    MUST(send(child_says[0], "say", 3, 0));
    char done;
    CHECK(recv(child_says[0], &done, 1, 0) == 1, "the child says nothing");
}

static void check_said(void) {
    struct ucred who = {0};
    int none[MOST];
    receive("own credentials", said[1], "me", 2, none, &who);
    CHECK(who.pid == getpid() && who.uid == 0, "sent by process %d, user %u", who.pid, who.uid);
    receive("the child's credentials", said[1], "child", 5, none, &who);
    CHECK(who.pid == child && who.uid == 1234 && who.gid == 4321, "sent by process %d, user %u, group %u", who.pid, who.uid, who.gid);
}

static void fill_letters(void) {
    struct sockaddr_un a;
    socklen_t n = name(&a, "torpor-server");
    MUST(sendto(letters[0], "one", 3, 0, (void *)&a, n));
    MUST(sendto(letters[1], "two", 3, 0, (void *)&a, n));
    MUST(sendto(letters[2], "nameless", 8, 0, (void *)&a, n));
    MUST(sendto(letters[0], "three", 5, 0, (void *)&a, n));
}

static void letter(const char *text, const char *from) {
    char bytes[32] = "";
    struct sockaddr_un a, wanted;
    socklen_t n = sizeof a, want = from ? name(&wanted, from) : 0;
    ssize_t got = recvfrom(server, bytes, sizeof bytes, MSG_DONTWAIT, (void *)&a, &n);
    CHECK(got == (ssize_t)strlen(text) && !strcmp(bytes, text), "letter %s: %zd bytes %s", text, got, bytes);
    CHECK(n == want && (!from || !memcmp(&a, &wanted, n)), "letter %s: sender of %u bytes", text, n);
}

static void check_letters(void) {
    letter("one", "torpor-one"), letter("two", "torpor-two"), letter("nameless", NULL), letter("three", "torpor-one");
}

static void call(int i) {
    struct sockaddr_un a;
    socklen_t n = name(&a, "torpor-listener");
    callers[i] = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(connect(callers[i], (void *)&a, n));
}

static void check_listener(void) {
    for (int i = 0; i < 3; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        CHECK(fd >= 0, "accept %d: %s", i, strerror(errno));
        char byte = (char)('0' + i), got = 0;
        MUST(send(callers[i], &byte, 1, 0));
        CHECK(recv(fd, &got, 1, MSG_DONTWAIT) == 1 && got == byte, "caller %d: %c", i, got);
        close(fd);
        close(callers[i]);
    }
    for (int i = 0; i < 3; i++) call(i);
}

static void verify(void) {
    check_stream(), fill_stream();
    check_ring(), fill_ring();
    check_said(), fill_said();
    check_letters(), fill_letters();
    check_listener();
    int fds = 0;
    for (int fd = 0; fd < 256; fd++) fds += fcntl(fd, F_GETFD) >= 0;
    static int before;
    CHECK(!before || fds == before, "%d descriptors, were %d", fds, before);
    before = fds;
}

static void child_main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    MUST(setregid(4321, 4321));
    MUST(setreuid(1234, 1234));
    char ask[3];
    while (recv(child_says[1], ask, 3, 0) == 3) {
        MUST(send(said[0], "child", 5, 0));
        MUST(send(child_says[1], "!", 1, 0));
    }
    _exit(9);
}

int main(void) {
    wl_init();
    for (size_t i = 0; i < sizeof plain; i++) plain[i] = (char)wl_byte(5, i);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, stream));
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ring));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, said));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, child_says));
    int on = 1;
    MUST(setsockopt(said[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    server = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    bound(server, "torpor-server");
    for (int i = 0; i < 3; i++) letters[i] = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    bound(letters[0], "torpor-one"), bound(letters[1], "torpor-two");
    listener = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
    bound(listener, "torpor-listener");
    MUST(listen(listener, 5));
    if (!(child = MUST(fork()))) child_main();
    fill_stream(), fill_ring(), fill_said(), fill_letters();
    for (int i = 0; i < 3; i++) call(i);
    wl_serve(verify);
}

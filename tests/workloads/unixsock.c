/* Unix sockets: pairs of each type with data waiting, half closed, options; listening ones by path and by abstract name; bound datagram ones. */
#include "workload.h"
#include <poll.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

static int stream[2], dgram[2], seqpacket[2], half[2], widow, by_path, by_name, bound, to_child[2], dup_listener;
static char big[100000];

static socklen_t path_address(struct sockaddr_un *a, const char *path) {
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    strcpy(a->sun_path, path);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path) + 1);
}
static socklen_t abstract_address(struct sockaddr_un *a) {
    memset(a, 0, sizeof *a);
    a->sun_family = AF_UNIX;
    memcpy(a->sun_path, "\0torpor\0odd name", 16);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 16);
}

static void expect(const char *what, int fd, const void *data, size_t length) {
    char bytes[70000] = {0};
    ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
    CHECK(n == (ssize_t)length, "%s: received %zd bytes (%s), expected %zu", what, n, n < 0 ? strerror(errno) : "", length);
    CHECK(n < 0 || !memcmp(bytes, data, n < (ssize_t)length ? (size_t)n : length), "%s: content", what);
}

static void expect_stream(const char *what, int fd, const char *data, size_t length) {
    size_t done = 0;
    char bytes[sizeof big];
    while (done < length) {
        ssize_t n = recv(fd, bytes + done, length - done, MSG_DONTWAIT);
        if (n <= 0) {
            wl_differs("%s: %zu of %zu bytes, then %s", what, done, length, n ? strerror(errno) : "end of file");
            return;
        }
        done += (size_t)n;
    }
    CHECK(!memcmp(bytes, data, length), "%s: content", what);
    CHECK(recv(fd, bytes, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "%s: more than was sent", what);
}

static void send_all(int fd, const char *data, size_t length) {
    while (length) {
        ssize_t n = MUST(send(fd, data, length, 0));
        data += n, length -= (size_t)n;
    }
}

static void fill(void) {
    send_all(stream[0], big, sizeof big);
    MUST(send(stream[1], "back", 4, 0));
    MUST(send(dgram[0], "first", 5, 0));
    MUST(send(dgram[0], "", 0, 0));
    MUST(send(dgram[0], "third one", 9, 0));
    MUST(send(seqpacket[1], "packet", 6, 0));
    MUST(send(seqpacket[1], big, 30000, 0));
}

static void check_option(const char *what, int fd, int option, int expected) {
    int value = 0;
    socklen_t n = sizeof value;
    MUST(getsockopt(fd, SOL_SOCKET, option, &value, &n));
    CHECK(value == expected, "%s: option %d is %d, was %d", what, option, value, expected);
}

static void connect_to(const char *what, int listener, struct sockaddr_un *a, socklen_t length) {
    int fd = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    if (connect(fd, (void *)a, length) != 0) {
        wl_differs("%s: connect: %s", what, strerror(errno));
    } else {
        int other = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
        CHECK(other >= 0, "%s: accept: %s", what, strerror(errno));
        MUST(send(fd, "hello", 5, 0));
        expect(what, other, "hello", 5);
        close(other);
    }
    close(fd);
}

static int queue_sizes[3];

static void verify(void) {
    expect_stream("stream", stream[1], big, sizeof big);
    expect_stream("stream, the other way", stream[0], "back", 4);
    expect("dgram 1", dgram[1], "first", 5);
    expect("dgram 2", dgram[1], "", 0);
    expect("dgram 3", dgram[1], "third one", 9);
    expect("seqpacket 1", seqpacket[0], "packet", 6);
    expect("seqpacket 2", seqpacket[0], big, 30000);
    fill();
    CHECK(recv(half[1], big + 1, 0, MSG_DONTWAIT) <= 0, "half closed");
    CHECK(send(half[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a socket shut down for writing sends");
    char b[8] = "";
    CHECK(recv(half[1], b, 8, MSG_DONTWAIT) == 0, "no end of file behind the shutdown");
    MUST(send(half[1], "way", 3, 0));
    expect("half closed, the open way", half[0], "way", 3);
    struct pollfd p = {widow, POLLIN, 0};
    poll(&p, 1, 0);
    CHECK((p.revents & POLLHUP) && (p.revents & POLLIN), "socket without peer: poll gives %x", p.revents);
    CHECK(recv(widow, b, 8, MSG_DONTWAIT | MSG_PEEK) == 5 && !memcmp(b, "tears", 5), "socket without peer: %.8s", b);
    check_option("half closed", half[0], SO_PASSCRED, 1);
    check_option("stream", stream[0], SO_SNDBUF, queue_sizes[0]);
    check_option("stream", stream[0], SO_RCVBUF, queue_sizes[1]);
    check_option("dgram", dgram[1], SO_TYPE, SOCK_DGRAM);
    CHECK(fcntl(dgram[1], F_GETFL) & O_NONBLOCK, "O_NONBLOCK of dgram is lost");
    CHECK(fcntl(dgram[1], F_GETFD) & FD_CLOEXEC, "FD_CLOEXEC of dgram is lost");
    struct timeval timeout = {0};
    socklen_t n = sizeof timeout;
    MUST(getsockopt(stream[1], SOL_SOCKET, SO_RCVTIMEO, &timeout, &n));
    CHECK(timeout.tv_sec == 3 && timeout.tv_usec == 500000, "SO_RCVTIMEO %ld.%06ld", timeout.tv_sec, timeout.tv_usec);
    struct ucred peer;
    n = sizeof peer;
    MUST(getsockopt(stream[0], SOL_SOCKET, SO_PEERCRED, &peer, &n));
    CHECK(peer.uid == getuid(), "SO_PEERCRED: pid %d uid %d", peer.pid, peer.uid);

    struct sockaddr_un a, now;
    socklen_t length = path_address(&a, "/wl/listener.sock");
    n = sizeof now;
    MUST(getsockname(by_path, (void *)&now, &n));
    CHECK(n == length && !memcmp(&now, &a, length), "listener by path: name %s", now.sun_path);
    check_option("listener", by_path, SO_ACCEPTCONN, 1);
    connect_to("listener by path", by_path, &a, length);
    connect_to("dup of the listener", dup_listener, &a, length);
    length = abstract_address(&a);
    n = sizeof now;
    MUST(getsockname(by_name, (void *)&now, &n));
    CHECK(n == length && !memcmp(&now, &a, length), "listener by name: name of %u bytes", n);
    connect_to("listener by name", by_name, &a, length);

    length = path_address(&a, "/wl/bound.sock");
    int fd = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    CHECK(sendto(fd, "letter", 6, 0, (void *)&a, length) == 6, "bound dgram: sendto: %s", strerror(errno));
    expect("bound dgram", bound, "letter", 6);
    close(fd);

    MUST(send(to_child[0], "ping", 4, 0));
    struct pollfd q = {to_child[0], POLLIN, 0};
    CHECK(poll(&q, 1, 5000) == 1, "the child does not answer");
    expect("the child", to_child[0], "pong", 4);
}

int main(void) {
    wl_init();
    for (size_t i = 0; i < sizeof big; i++) big[i] = (char)wl_byte(3, i);
    int size = 400000;
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, stream));
    MUST(setsockopt(stream[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size));
    struct timeval timeout = {3, 500000};
    MUST(setsockopt(stream[1], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout));
    socklen_t n = sizeof(int);
    MUST(getsockopt(stream[0], SOL_SOCKET, SO_SNDBUF, &queue_sizes[0], &n));
    MUST(getsockopt(stream[0], SOL_SOCKET, SO_RCVBUF, &queue_sizes[1], &n));
    MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, dgram));
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, seqpacket));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, half));
    int on = 1;
    MUST(setsockopt(half[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    MUST(shutdown(half[0], SHUT_WR));
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(send(pair[0], "tears", 5, 0));
    close(pair[0]);
    widow = pair[1];
    struct sockaddr_un a;
    unlink("/wl/listener.sock");
    unlink("/wl/bound.sock");
    socklen_t length = path_address(&a, "/wl/listener.sock");
    by_path = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
    MUST(bind(by_path, (void *)&a, length));
    MUST(listen(by_path, 7));
    dup_listener = MUST(dup(by_path));
    length = abstract_address(&a);
    by_name = MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
    MUST(bind(by_name, (void *)&a, length));
    MUST(listen(by_name, 7));
    length = path_address(&a, "/wl/bound.sock");
    bound = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
    MUST(bind(bound, (void *)&a, length));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, to_child));
    if (!MUST(fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        char b[4];
        while (recv(to_child[1], b, 4, 0) == 4) MUST(send(to_child[1], "pong", 4, 0));
        _exit(9);
    }
    fill();
    wl_serve(verify);
}

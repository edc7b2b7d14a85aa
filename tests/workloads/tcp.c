/* TCP connections inside the container, v4, v6 and v4-mapped: live traffic both ways between two processes, data that waits at both ends
 * and beyond what buffers hold, every half-closed state, a peer that is gone, connections nobody accepted yet, options, edge-triggered epoll. */
#include "workload.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { V4, V6, MAPPED, FAMILIES };
static const char *family_names[] = {"v4", "v6", "v4-mapped"};
static int listeners[FAMILIES];

static void loopback_up(void) {
    int fd = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct ifreq r = {.ifr_name = "lo"};
    MUST(ioctl(fd, SIOCGIFFLAGS, &r));
    r.ifr_flags |= IFF_UP;
    MUST(ioctl(fd, SIOCSIFFLAGS, &r));
    close(fd);
}

static socklen_t address(int family, int port, struct sockaddr_in6 *a) {
    memset(a, 0, sizeof *a);
    if (family == V4) {
        struct sockaddr_in *b = (void *)a;
        b->sin_family = AF_INET, b->sin_port = htons((uint16_t)port), b->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return sizeof *b;
    }
    a->sin6_family = AF_INET6, a->sin6_port = htons((uint16_t)port);
    MUST(inet_pton(AF_INET6, family == V6 ? "::1" : "::ffff:127.0.0.1", &a->sin6_addr));
    return sizeof *a;
}

static int caller(int family) { return MUST(socket(family == V4 ? AF_INET : AF_INET6, SOCK_STREAM, 0)); }

static void join(int family, int fd) {
    struct sockaddr_in6 a;
    socklen_t n = address(family, 9000 + family, &a);
    MUST(connect(fd, (void *)&a, n));
}

struct pair { int a, b; };

static struct pair connected(int family) {
    struct pair p = {caller(family), -1};
    join(family, p.a);
    p.b = MUST(accept(listeners[family], NULL, NULL));
    return p;
}

static void nonblocking(int fd) { MUST(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK)); }

/* Fills a direction until nothing more goes; the number of bytes. */
static size_t stuff(int fd, uint64_t seed) {
    static unsigned char bytes[65536];
    size_t sent = 0;
    nonblocking(fd);
    for (int idle = 0; idle < 6;) {
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = wl_byte(seed, sent + i);
        ssize_t n = send(fd, bytes, sizeof bytes, MSG_NOSIGNAL);
        if (n > 0) sent += (size_t)n, idle = 0;
        else idle++, wl_sleep(0.005);
    }
    return sent;
}

static void drain(const char *what, int fd, uint64_t seed, size_t length) {
    static unsigned char bytes[65536];
    for (size_t got = 0; got < length;) {
        struct pollfd p = {fd, POLLIN, 0};
        if (poll(&p, 1, 8000) != 1) {
            wl_differs("%s: only %zu of %zu bytes arrive", what, got, length);
            return;
        }
        size_t want = length - got < sizeof bytes ? length - got : sizeof bytes;
        ssize_t n = recv(fd, bytes, want, MSG_DONTWAIT);
        if (n <= 0) {
            wl_differs("%s: %zd after %zu of %zu bytes: %s", what, n, got, length, n ? strerror(errno) : "end");
            return;
        }
        for (ssize_t i = 0; i < n; i++)
            if (bytes[i] != wl_byte(seed, got + (size_t)i)) {
                wl_differs("%s: byte %zu is wrong", what, got + (size_t)i);
                return;
            }
        got += (size_t)n;
    }
    char more;
    CHECK(recv(fd, &more, 1, MSG_DONTWAIT | MSG_PEEK) <= 0, "%s: there is more than was sent", what);
}

/* ---- full: both directions stuffed, with buffers over 4 MiB ------------------------------------------------------------------------ */

static struct pair full[FAMILIES];
static size_t stuffed[FAMILIES][2];
static int waiting_bytes[FAMILIES];

static void full_up(int f) {
    int size = 6 << 20;
    if (f != V4) size = 200000;
    for (int i = 0; i < 2; i++) {
        int fd = i ? full[f].b : full[f].a;
        MUST(setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size));
        MUST(setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size));
    }
    stuffed[f][0] = stuff(full[f].a, 10 + (uint64_t)f);
    stuffed[f][1] = stuff(full[f].b, 20 + (uint64_t)f);
    MUST(ioctl(full[f].b, FIONREAD, &waiting_bytes[f]));
}

static void full_verify(int f) {
    char what[64];
    int now;
    MUST(ioctl(full[f].b, FIONREAD, &now));
    /* a probe of the full window may bring a little more */
    CHECK(now >= waiting_bytes[f] && now < waiting_bytes[f] + 70000, "full %s: %d bytes can be read, were %d", family_names[f], now, waiting_bytes[f]);
    snprintf(what, sizeof what, "full %s a to b", family_names[f]);
    drain(what, full[f].b, 10 + (uint64_t)f, stuffed[f][0]);
    snprintf(what, sizeof what, "full %s b to a", family_names[f]);
    drain(what, full[f].a, 20 + (uint64_t)f, stuffed[f][1]);
    full_up(f);
}

/* ---- states: what each side has closed ------------------------------------------------------------------------------------------------- */

/* a has closed, with data before the end; b may have too */
static struct pair closing[FAMILIES][3];
static int gone[FAMILIES], waiting[FAMILIES];

static int state_of(int fd) {
    struct tcp_info info;
    socklen_t n = sizeof info;
    MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n));
    return info.tcpi_state;
}

static void closing_up(int f) {
    for (int i = 0; i < 3; i++) closing[f][i] = connected(f);
    /* 0: FIN_WAIT2 and CLOSE_WAIT */
    MUST(send(closing[f][0].a, "last words", 10, 0));
    MUST(shutdown(closing[f][0].a, SHUT_WR));
    /* 1: FIN_WAIT1 with unsent data before the end */
    int small = 32768;
    MUST(setsockopt(closing[f][1].b, SOL_SOCKET, SO_RCVBUF, &small, sizeof small));
    MUST(setsockopt(closing[f][1].a, SOL_SOCKET, SO_SNDBUF, &small, sizeof small));
    /* 2: data both ways, b closed */
    MUST(send(closing[f][2].a, "to b", 4, 0));
    MUST(send(closing[f][2].b, "to a", 4, 0));
    MUST(shutdown(closing[f][2].b, SHUT_WR));
    /* a peer that is gone */
    struct pair p = connected(f);
    MUST(send(p.a, "farewell", 8, 0));
    MUST(close(p.a));
    gone[f] = p.b;
    /* two that nobody accepted */
    waiting[f] = caller(f);
    join(f, waiting[f]);
}

static size_t jam[FAMILIES];

static void jam_up(int f) {
    jam[f] = stuff(closing[f][1].a, 30 + (uint64_t)f);
    MUST(shutdown(closing[f][1].a, SHUT_WR));
}

static void read_text(const char *what, int f, int fd, const char *text) {
    char bytes[64] = "";
    struct pollfd p = {fd, POLLIN, 0};
    if (poll(&p, 1, 3000) != 1) {
        wl_differs("%s %s: nothing to read", what, family_names[f]);
        return;
    }
    ssize_t n = recv(fd, bytes, strlen(text) ? strlen(text) : 1, MSG_DONTWAIT);
    CHECK(n == (ssize_t)strlen(text) && !memcmp(bytes, text, strlen(text)), "%s %s: read %zd '%s' instead of '%s'", what, family_names[f], n,
          bytes, text);
}

static void closing_verify(int f) {
    struct pair *p = closing[f];
    CHECK(state_of(p[0].a) == TCP_FIN_WAIT2, "%s: state %d, not FIN_WAIT2", family_names[f], state_of(p[0].a));
    CHECK(state_of(p[0].b) == TCP_CLOSE_WAIT, "%s: state %d, not CLOSE_WAIT", family_names[f], state_of(p[0].b));
    CHECK(state_of(p[1].a) == TCP_FIN_WAIT1, "%s: state %d, not FIN_WAIT1", family_names[f], state_of(p[1].a));
    CHECK(state_of(gone[f]) == TCP_CLOSE_WAIT, "%s: gone peer: state %d, not CLOSE_WAIT", family_names[f], state_of(gone[f]));
    read_text("half-closed", f, p[0].b, "last words");
    read_text("end", f, p[0].b, "");
    MUST(send(p[0].b, "still heard", 11, MSG_NOSIGNAL));
    read_text("still", f, p[0].a, "still heard");
    CHECK(send(p[0].a, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "%s: can send after its end", family_names[f]);
    char what[64];
    snprintf(what, sizeof what, "jam %s", family_names[f]);
    drain(what, p[1].b, 30 + (uint64_t)f, jam[f]);
    read_text("end of jam", f, p[1].b, "");
    read_text("other way", f, p[2].b, "to b");
    read_text("closed by b", f, p[2].a, "to a");
    read_text("end by b", f, p[2].a, "");
    read_text("gone", f, gone[f], "farewell");
    read_text("gone end", f, gone[f], "");
    /* the one in the backlog */
    struct pollfd ready = {listeners[f], POLLIN, 0};
    CHECK(poll(&ready, 1, 3000) == 1, "%s: nobody waits to be accepted", family_names[f]);
    struct sockaddr_in6 from = {0}, own = {0};
    socklen_t n = sizeof from, m = sizeof own;
    int late = ready.revents ? accept(listeners[f], (void *)&from, &n) : -1;
    if (late >= 0) {
        MUST(getsockname(waiting[f], (void *)&own, &m));
        CHECK(from.sin6_port == own.sin6_port, "%s: another one waited", family_names[f]);
        MUST(send(waiting[f], "hello", 5, 0));
        read_text("accepted late", f, late, "hello");
        close(late);
    }
    ready.revents = 0;
    CHECK(poll(&ready, 1, 0) == 0, "%s: too many wait", family_names[f]);
    for (int i = 0; i < 3; i++) close(p[i].a), close(p[i].b);
    close(gone[f]), close(waiting[f]);
    closing_up(f);
    jam_up(f);
}

/* ---- options ------------------------------------------------------------------------------------------------------------------------------------ */

static struct { const char *name; int level, number, set; } options[] = {
    {"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, 1},       {"TCP_USER_TIMEOUT", IPPROTO_TCP, TCP_USER_TIMEOUT, 7777},
    {"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, 55},    {"TCP_KEEPINTVL", IPPROTO_TCP, TCP_KEEPINTVL, 11},
    {"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, 6},       {"TCP_LINGER2", IPPROTO_TCP, TCP_LINGER2, 33},
    {"TCP_NOTSENT_LOWAT", IPPROTO_TCP, 25, 4096},       {"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, 1},
    {"SO_PRIORITY", SOL_SOCKET, SO_PRIORITY, 4},        {"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, 1},
    {"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR, 1},      {"SO_RCVLOWAT", SOL_SOCKET, SO_RCVLOWAT, 1},
    {"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, 0},
    {"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, 0},
};
#define OPTIONS (int)(sizeof options / sizeof *options)
static struct pair set_pair[FAMILIES];
static int values[FAMILIES][OPTIONS];
static char congestion[FAMILIES][16];
static struct tcp_info agreed[FAMILIES];

static int option(int fd, int i) {
    int value = 0;
    socklen_t n = sizeof value;
    MUST(getsockopt(fd, options[i].level, options[i].number, &value, &n));
    return value;
}

static void options_up(int f) {
    set_pair[f] = connected(f);
    for (int i = 0; i < OPTIONS; i++)
        if (options[i].set) MUST(setsockopt(set_pair[f].a, options[i].level, options[i].number, &options[i].set, sizeof(int)));
    setsockopt(set_pair[f].a, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
    for (int i = 0; i < OPTIONS; i++) values[f][i] = option(set_pair[f].a, i);
    socklen_t n = sizeof congestion[f];
    MUST(getsockopt(set_pair[f].a, IPPROTO_TCP, TCP_CONGESTION, congestion[f], &n));
    n = sizeof agreed[f];
    MUST(getsockopt(set_pair[f].a, IPPROTO_TCP, TCP_INFO, &agreed[f], &n));
}

static void options_verify(int f) {
    for (int i = 0; i < OPTIONS; i++) {
        int now = option(set_pair[f].a, i);
        CHECK(now == values[f][i], "%s %s is %d, was %d", family_names[f], options[i].name, now, values[f][i]);
    }
    char name[16] = "";
    socklen_t n = sizeof name;
    MUST(getsockopt(set_pair[f].a, IPPROTO_TCP, TCP_CONGESTION, name, &n));
    CHECK(!strcmp(name, congestion[f]), "%s: congestion control %s, was %s", family_names[f], name, congestion[f]);
    struct tcp_info now;
    n = sizeof now;
    MUST(getsockopt(set_pair[f].a, IPPROTO_TCP, TCP_INFO, &now, &n));
    CHECK((now.tcpi_options & 7) == (agreed[f].tcpi_options & 7), "%s: agreed on %d, was %d", family_names[f], now.tcpi_options,
          agreed[f].tcpi_options);
    CHECK(now.tcpi_snd_wscale == agreed[f].tcpi_snd_wscale && now.tcpi_rcv_wscale == agreed[f].tcpi_rcv_wscale, "%s: window scales %d %d", family_names[f],
          now.tcpi_snd_wscale, now.tcpi_rcv_wscale);
    /* loopback takes large segments; what is exact moves with what was sent */
    int segment = 0;
    n = sizeof segment;
    MUST(getsockopt(set_pair[f].a, IPPROTO_TCP, TCP_MAXSEG, &segment, &n));
    CHECK(segment > 32000, "%s: segments of %d bytes", family_names[f], segment);
    MUST(send(set_pair[f].a, "ping", 4, 0));
    read_text("options", f, set_pair[f].b, "ping");
}

/* ---- epoll: an edge that was seen is not seen again ---------------------------------------------------------------------------- */

static struct pair watched;
static int epoll;

static void epoll_verify(void) {
    struct epoll_event e;
    MUST(send(watched.a, "x", 1, 0));
    int n = epoll_wait(epoll, &e, 1, 3000);
    CHECK(n == 1 && (e.events & EPOLLIN) && e.data.u64 == 4711, "epoll: no edge for new data: %d", n);
    char byte;
    CHECK(recv(watched.b, &byte, 1, MSG_DONTWAIT) == 1, "epoll: no byte");
    while (epoll_wait(epoll, &e, 1, 0) == 1) {}
}

/* ---- live traffic between two processes ------------------------------------------------------------------------------------------- */

static volatile uint64_t *counters; /* bytes that each side has checked, and the first wrong one */

/* Sends a known sequence and checks what comes back, as fast as it goes. */
static void stream(int fd, uint64_t out_seed, uint64_t in_seed, int slot) {
    static unsigned char out[8192], in[8192];
    uint64_t sent = 0, got = 0;
    nonblocking(fd);
    for (;;) {
        struct pollfd p = {fd, POLLIN | POLLOUT, 0};
        poll(&p, 1, -1);
        if (p.revents & POLLOUT) {
            size_t want = 1 + (size_t)(sent * 7919 % sizeof out);
            for (size_t i = 0; i < want; i++) out[i] = wl_byte(out_seed, sent + i);
            ssize_t n = send(fd, out, want, MSG_NOSIGNAL);
            if (n > 0) sent += (uint64_t)n;
            else if (n < 0 && errno != EAGAIN && errno != EINTR) counters[4 + slot] = (uint64_t)errno + 1000000;
        }
        if (p.revents & (POLLIN | POLLHUP | POLLERR)) {
            ssize_t n = recv(fd, in, sizeof in, 0);
            if (n == 0) counters[4 + slot] = 2000000;
            if (n < 0 && errno != EAGAIN && errno != EINTR) counters[4 + slot] = (uint64_t)errno + 3000000;
            for (ssize_t i = 0; i < n; i++)
                if (in[i] != wl_byte(in_seed, got + (uint64_t)i) && !counters[4 + slot]) counters[4 + slot] = got + (uint64_t)i + 1;
            if (n > 0) counters[slot] = got += (uint64_t)n;
        }
        if (counters[4 + slot]) _exit(1);
        struct timespec pause = {0, 200000};
        nanosleep(&pause, NULL);
    }
}

static void live_up(void) {
    counters = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    struct pair p = connected(V4);
    for (int side = 0; side < 2; side++)
        if (MUST(fork()) == 0) {
            close(side ? p.a : p.b);
            stream(side ? p.b : p.a, 100 + (uint64_t)side, 101 - (uint64_t)side, side);
        }
    close(p.a), close(p.b);
}

static void live_verify(void) {
    uint64_t before[2] = {counters[0], counters[1]};
    for (int i = 0; i < 400 && (counters[0] < before[0] + 10000 || counters[1] < before[1] + 10000); i++) wl_sleep(0.02);
    for (int side = 0; side < 2; side++) {
        CHECK(counters[side] > before[side], "live side %d: stands still after %llu bytes", side, (unsigned long long)before[side]);
        CHECK(!counters[4 + side], "live side %d: wrong at %llu", side, (unsigned long long)counters[4 + side]);
    }
}

static void verify(void) {
    live_verify();
    for (int f = 0; f < FAMILIES; f++) {
        full_verify(f);
        closing_verify(f);
        options_verify(f);
    }
    epoll_verify();
}

int main(void) {
    wl_init();
    loopback_up();
    int on = 1;
    for (int f = 0; f < FAMILIES; f++) {
        listeners[f] = caller(f);
        struct sockaddr_in6 a;
        socklen_t n = address(f, 9000 + f, &a);
        MUST(setsockopt(listeners[f], SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
        MUST(bind(listeners[f], (void *)&a, n));
        MUST(listen(listeners[f], 20));
    }
    live_up();
    for (int f = 0; f < FAMILIES; f++) {
        full[f] = connected(f);
        full_up(f);
        options_up(f);
        watched = f == V4 ? connected(f) : watched;
        closing_up(f);
        jam_up(f);
    }
    epoll = MUST(epoll_create1(EPOLL_CLOEXEC));
    struct epoll_event e = {.events = EPOLLIN | EPOLLET, .data.u64 = 4711};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, watched.b, &e));
    wl_serve(verify);
}

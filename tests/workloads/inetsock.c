/* TCP and UDP sockets that are not connected: listening on v4 and v6, bound only, fresh; options and backlog; UDP bound on v4 and v6. */
#include "workload.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static int tcp4, tcp6, only6, bound, fresh, udp4, udp6, udp_fresh, dup_tcp4;

static struct { const char *name; int *fd, level, option; } options[] = {
    {"tcp4 SO_REUSEADDR", &tcp4, SOL_SOCKET, SO_REUSEADDR}, {"tcp4 SO_REUSEPORT", &tcp4, SOL_SOCKET, SO_REUSEPORT},
    {"tcp4 SO_KEEPALIVE", &tcp4, SOL_SOCKET, SO_KEEPALIVE}, {"tcp4 SO_RCVBUF", &tcp4, SOL_SOCKET, SO_RCVBUF},
    {"tcp4 SO_SNDBUF", &tcp4, SOL_SOCKET, SO_SNDBUF},       {"tcp4 SO_ACCEPTCONN", &tcp4, SOL_SOCKET, SO_ACCEPTCONN},
    {"tcp4 SO_PRIORITY", &tcp4, SOL_SOCKET, SO_PRIORITY},   {"tcp4 TCP_NODELAY", &tcp4, IPPROTO_TCP, TCP_NODELAY},
    {"tcp4 TCP_KEEPIDLE", &tcp4, IPPROTO_TCP, TCP_KEEPIDLE}, {"tcp4 TCP_KEEPINTVL", &tcp4, IPPROTO_TCP, TCP_KEEPINTVL},
    {"tcp4 TCP_KEEPCNT", &tcp4, IPPROTO_TCP, TCP_KEEPCNT},  {"tcp4 TCP_DEFER_ACCEPT", &tcp4, IPPROTO_TCP, TCP_DEFER_ACCEPT},
    {"tcp4 TCP_MAXSEG", &tcp4, IPPROTO_TCP, TCP_USER_TIMEOUT}, {"tcp4 IP_TOS", &tcp4, IPPROTO_IP, IP_TOS},
    {"tcp4 IP_TTL", &tcp4, IPPROTO_IP, IP_TTL},             {"tcp6 SO_REUSEADDR", &tcp6, SOL_SOCKET, SO_REUSEADDR},
    {"only6 IPV6_V6ONLY", &only6, IPPROTO_IPV6, IPV6_V6ONLY}, {"tcp6 IPV6_V6ONLY", &tcp6, IPPROTO_IPV6, IPV6_V6ONLY},
    {"udp4 SO_BROADCAST", &udp4, SOL_SOCKET, SO_BROADCAST}, {"udp4 SO_RCVBUF", &udp4, SOL_SOCKET, SO_RCVBUF},
    {"udp4 IP_PKTINFO", &udp4, IPPROTO_IP, IP_PKTINFO},     {"udp6 IPV6_RECVPKTINFO", &udp6, IPPROTO_IPV6, IPV6_RECVPKTINFO},
    {"fresh TCP_NODELAY", &fresh, IPPROTO_TCP, TCP_NODELAY}, {"fresh SO_TYPE", &fresh, SOL_SOCKET, SO_TYPE},
    {"fresh SO_DOMAIN", &fresh, SOL_SOCKET, SO_DOMAIN},     {"tcp6 SO_DOMAIN", &tcp6, SOL_SOCKET, SO_DOMAIN},
};
#define OPTIONS (int)(sizeof options / sizeof *options)
static int values[OPTIONS];
static struct sockaddr_in6 names[8];
static int *sockets[] = {&tcp4, &tcp6, &only6, &bound, &udp4, &udp6};
#define SOCKETS (int)(sizeof sockets / sizeof *sockets)

/* A fresh network namespace has its loopback interface down. */
static void loopback_up(void) {
    int fd = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct ifreq r = {.ifr_name = "lo"};
    MUST(ioctl(fd, SIOCGIFFLAGS, &r));
    if (!(r.ifr_flags & IFF_UP)) {
        r.ifr_flags |= IFF_UP;
        MUST(ioctl(fd, SIOCSIFFLAGS, &r));
    }
    close(fd);
}

static int port_of(int fd) {
    struct sockaddr_in6 a;
    socklen_t n = sizeof a;
    MUST(getsockname(fd, (void *)&a, &n));
    return ntohs(a.sin6_port); /* at the same place in sockaddr_in */
}

static void talk(const char *what, int listener, int family, int port) {
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct sockaddr_in b = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = MUST(socket(family, SOCK_STREAM, 0));
    if (connect(fd, family == AF_INET6 ? (void *)&a : (void *)&b, family == AF_INET6 ? sizeof a : sizeof b) != 0) {
        wl_differs("%s: connect: %s", what, strerror(errno));
        close(fd);
        return;
    }
    MUST(send(fd, "hello", 5, 0));
    struct pollfd p = {listener, POLLIN, 0};
    CHECK(poll(&p, 1, 5000) == 1, "%s: no connection arrives", what);
    int other = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    CHECK(other >= 0, "%s: accept: %s", what, strerror(errno));
    if (other >= 0) {
        p = (struct pollfd){other, POLLIN, 0};
        poll(&p, 1, 5000);
        char bytes[8] = "";
        ssize_t n = recv(other, bytes, 8, 0);
        CHECK(n == 5 && !memcmp(bytes, "hello", 5), "%s: received %zd bytes", what, n);
        /* reset it, so that no TIME_WAIT is left: connected sockets are not this workload's subject */
        struct linger now = {1, 0};
        MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
        close(fd);
        wl_sleep(0.01);
        close(other);
        return;
    }
    close(fd);
}

static void letter(const char *what, int to, int family) {
    int port = port_of(to);
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    struct sockaddr_in b = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = MUST(socket(family, SOCK_DGRAM, 0));
    ssize_t n = sendto(fd, "letter", 6, 0, family == AF_INET6 ? (void *)&a : (void *)&b, family == AF_INET6 ? sizeof a : sizeof b);
    CHECK(n == 6, "%s: sendto: %s", what, strerror(errno));
    struct pollfd p = {to, POLLIN, 0};
    CHECK(poll(&p, 1, 5000) == 1, "%s: no letter arrives", what);
    char bytes[16] = "";
    n = recv(to, bytes, 16, MSG_DONTWAIT);
    CHECK(n == 6 && !memcmp(bytes, "letter", 6), "%s: received %zd bytes", what, n);
    close(fd);
}

static void verify(void) {
    loopback_up();
    for (int i = 0; i < OPTIONS; i++) {
        int value = 0;
        socklen_t n = sizeof value;
        MUST(getsockopt(*options[i].fd, options[i].level, options[i].option, &value, &n));
        CHECK(value == values[i], "%s is %d, was %d", options[i].name, value, values[i]);
    }
    for (int i = 0; i < SOCKETS; i++) {
        struct sockaddr_in6 now = {0};
        socklen_t n = sizeof now;
        MUST(getsockname(*sockets[i], (void *)&now, &n));
        CHECK(!memcmp(&now, &names[i], sizeof now), "socket %d has another name: family %d port %d", i, now.sin6_family, ntohs(now.sin6_port));
    }
    CHECK(fcntl(tcp4, F_GETFL) & O_NONBLOCK, "O_NONBLOCK is lost");
    CHECK(fcntl(tcp4, F_GETFD) & FD_CLOEXEC, "FD_CLOEXEC is lost");
    struct tcp_info info;
    socklen_t n = sizeof info;
    MUST(getsockopt(tcp6, IPPROTO_TCP, TCP_INFO, &info, &n));
    CHECK(info.tcpi_state == 10 /* TCP_LISTEN */ && info.tcpi_sacked == 9, "tcp6: state %d backlog %d", info.tcpi_state, info.tcpi_sacked);
    talk("tcp v4", tcp4, AF_INET, port_of(tcp4));
    talk("dup of tcp v4", dup_tcp4, AF_INET, port_of(tcp4));
    talk("tcp v6", tcp6, AF_INET6, port_of(tcp6));
    talk("tcp v4 to v6", tcp6, AF_INET, port_of(tcp6));
    talk("tcp v6 only", only6, AF_INET6, port_of(only6));
    letter("udp v4", udp4, AF_INET);
    letter("udp v6", udp6, AF_INET6);
    int error = 0;
    n = sizeof error;
    MUST(getsockopt(fresh, SOL_SOCKET, SO_ERROR, &error, &n));
    CHECK(error == 0, "fresh: error %d", error);
    CHECK(connect(fresh, (void *)&names[3], sizeof(struct sockaddr_in)) == -1 && errno == ECONNREFUSED, "a port that is only bound accepts: %s",
          strerror(errno));
}

static int make(int family, int type, int port, int backlog) {
    int fd = MUST(socket(family, type, 0)), on = 1;
    MUST(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on));
    struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    struct sockaddr_in b = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (port == 8083) {
        on = 1;
        MUST(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on));
    }
    MUST(bind(fd, family == AF_INET6 ? (void *)&a : (void *)&b, family == AF_INET6 ? sizeof a : sizeof b));
    if (backlog) MUST(listen(fd, backlog));
    return fd;
}

static void set(int fd, int level, int option, int value) { MUST(setsockopt(fd, level, option, &value, sizeof value)); }

int main(void) {
    wl_init();
    loopback_up();
    tcp4 = MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(8081), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    set(tcp4, SOL_SOCKET, SO_REUSEADDR, 1);
    set(tcp4, SOL_SOCKET, SO_REUSEPORT, 1);
    set(tcp4, SOL_SOCKET, SO_KEEPALIVE, 1);
    set(tcp4, SOL_SOCKET, SO_RCVBUF, 100000);
    set(tcp4, SOL_SOCKET, SO_SNDBUF, 120000);
    set(tcp4, SOL_SOCKET, SO_PRIORITY, 4);
    set(tcp4, IPPROTO_TCP, TCP_NODELAY, 1);
    set(tcp4, IPPROTO_TCP, TCP_KEEPIDLE, 55);
    set(tcp4, IPPROTO_TCP, TCP_KEEPINTVL, 11);
    set(tcp4, IPPROTO_TCP, TCP_KEEPCNT, 6);
    set(tcp4, IPPROTO_TCP, TCP_USER_TIMEOUT, 7777);
    set(tcp4, IPPROTO_IP, IP_TOS, 0x10);
    set(tcp4, IPPROTO_IP, IP_TTL, 33);
    MUST(bind(tcp4, (void *)&a, sizeof a));
    MUST(listen(tcp4, 5));
    dup_tcp4 = MUST(dup(tcp4));
    tcp6 = make(AF_INET6, SOCK_STREAM, 8082, 9);
    only6 = make(AF_INET6, SOCK_STREAM, 8083, 3);
    bound = MUST(socket(AF_INET, SOCK_STREAM, 0));
    a.sin_port = htons(8084);
    MUST(bind(bound, (void *)&a, sizeof a));
    fresh = MUST(socket(AF_INET, SOCK_STREAM, 0));
    set(fresh, IPPROTO_TCP, TCP_NODELAY, 1);
    udp4 = make(AF_INET, SOCK_DGRAM, 8085, 0);
    set(udp4, SOL_SOCKET, SO_BROADCAST, 1);
    set(udp4, SOL_SOCKET, SO_RCVBUF, 90000);
    set(udp4, IPPROTO_IP, IP_PKTINFO, 1);
    udp6 = make(AF_INET6, SOCK_DGRAM, 8086, 0);
    set(udp6, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
    udp_fresh = MUST(socket(AF_INET6, SOCK_DGRAM, 0));
    for (int i = 0; i < OPTIONS; i++) {
        socklen_t n = sizeof(int);
        MUST(getsockopt(*options[i].fd, options[i].level, options[i].option, &values[i], &n));
    }
    for (int i = 0; i < SOCKETS; i++) {
        socklen_t n = sizeof names[i];
        MUST(getsockname(*sockets[i], (void *)&names[i], &n));
    }
    wl_serve(verify);
}

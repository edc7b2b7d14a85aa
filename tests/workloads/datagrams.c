/* UDP sockets with datagrams that wait: of several senders on v4 and v6, in a socket of both, in one that has a peer by now. */
#include "workload.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

static int v4, both, tied, senders[3];
static char big[20000];

static void loopback_up(void) {
    int fd = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    struct ifreq r = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    MUST(ioctl(fd, SIOCSIFFLAGS, &r));
    close(fd);
}

static struct sockaddr_in at4(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
}

static struct sockaddr_in6 at6(int port) {
    return (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
}

static int bound4(int port) {
    struct sockaddr_in a = at4(port);
    int fd = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    MUST(bind(fd, (void *)&a, sizeof a));
    return fd;
}

static void send4(int from, int port, const void *data, size_t length) {
    struct sockaddr_in a = at4(port);
    MUST(sendto(from, data, length, 0, (void *)&a, sizeof a));
}

static void send6(int from, int port, const void *data, size_t length) {
    struct sockaddr_in6 a = at6(port);
    MUST(sendto(from, data, length, 0, (void *)&a, sizeof a));
}

static void fill(void) {
    send4(senders[0], 9001, "one", 3), send4(senders[1], 9001, big, sizeof big), send4(senders[0], 9001, "three", 5);
    send6(senders[2], 9002, "six", 3), send4(senders[1], 9002, "four", 4), send6(senders[2], 9002, big, sizeof big);
    send4(senders[0], 9003, "from the peer", 13);
}

static void next(const char *what, int fd, const void *data, size_t length, int port) {
    static char bytes[70000];
    struct pollfd p = {fd, POLLIN, 0};
    CHECK(poll(&p, 1, 5000) == 1, "%s: nothing waits", what);
    struct sockaddr_in6 from = {0};
    socklen_t n = sizeof from;
    ssize_t got = recvfrom(fd, bytes, sizeof bytes, MSG_DONTWAIT, (void *)&from, &n);
    CHECK(got == (ssize_t)length && !memcmp(bytes, data, length), "%s: %zd bytes", what, got);
    /* at the same place in sockaddr_in */
    CHECK(ntohs(from.sin6_port) == port, "%s: from port %d", what, ntohs(from.sin6_port));
}

static void verify(void) {
    loopback_up();
    next("v4, first", v4, "one", 3, 9101), next("v4, second", v4, big, sizeof big, 9102), next("v4, third", v4, "three", 5, 9101);
    next("both, first", both, "six", 3, 9103), next("both, second", both, "four", 4, 9102), next("both, third", both, big, sizeof big, 9103);
    next("tied", tied, "from the peer", 13, 9101);
    char byte;
    CHECK(recv(v4, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "v4: one more");
    CHECK(recv(both, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "both: one more");
    /* One that has a peer takes nothing from others. */
    send4(senders[1], 9003, "stranger", 8);
    wl_sleep(0.02);
    CHECK(recv(tied, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "tied: it lost its peer");
    int on = 0;
    socklen_t n = sizeof on;
    MUST(getsockopt(v4, IPPROTO_IP, IP_RECVTTL, &on, &n));
    CHECK(on == 1, "IP_RECVTTL is %d", on);
    fill();
}

int main(void) {
    wl_init();
    loopback_up();
    for (size_t i = 0; i < sizeof big; i++) big[i] = (char)wl_byte(9, i);
    v4 = bound4(9001);
    int on = 1;
    MUST(setsockopt(v4, IPPROTO_IP, IP_RECVTTL, &on, sizeof on));
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(9002)};
    both = MUST(socket(AF_INET6, SOCK_DGRAM, 0));
    MUST(bind(both, (void *)&any, sizeof any));
    senders[0] = bound4(9101), senders[1] = bound4(9102);
    struct sockaddr_in6 from = at6(9103);
    senders[2] = MUST(socket(AF_INET6, SOCK_DGRAM, 0));
    MUST(bind(senders[2], (void *)&from, sizeof from));
    tied = bound4(9003);
    struct sockaddr_in peer = at4(9101);
    MUST(connect(tied, (void *)&peer, sizeof peer));
    fill();
    wl_serve(verify);
}

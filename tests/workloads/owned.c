/* Users and groups of what is open: unix and network sockets, the file of a listening one, a memfd. */
#include "workload.h"
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

static int listener, pair[2], udp, memory;
static struct sockaddr_un name = {AF_UNIX, "/wl/owned.sock"};

static void check_owner(const char *what, const struct stat *s, uid_t uid, gid_t gid) {
    CHECK(s->st_uid == uid && s->st_gid == gid, "%s is of %u:%u, was of %u:%u", what, s->st_uid, s->st_gid, uid, gid);
}

static void check(const char *what, int fd, uid_t uid, gid_t gid) {
    struct stat s;
    MUST(fstat(fd, &s));
    check_owner(what, &s, uid, gid);
}

static void verify(void) {
    struct stat s;
    MUST(stat(name.sun_path, &s));
    check_owner("the file", &s, 33, 44);
    CHECK((s.st_mode & 0777) == 0620, "the file has mode %o", s.st_mode);
    check("the listener", listener, 5, 6);
    check("the pair", pair[0], 7, 8);
    check("the UDP socket", udp, 9, 10);
    check("the memfd", memory, 11, 12);
    int client = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    CHECK(connect(client, (void *)&name, sizeof name) == 0, "connect: %s", strerror(errno));
    close(MUST(accept(listener, NULL, NULL)));
    close(client);
}

int main(void) {
    wl_init();
    listener = MUST(socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(bind(listener, (void *)&name, sizeof name));
    MUST(chmod(name.sun_path, 0620));
    MUST(chown(name.sun_path, 33, 44));
    MUST(listen(listener, 5));
    MUST(fchown(listener, 5, 6));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(fchown(pair[0], 7, 8));
    udp = MUST(socket(AF_INET, SOCK_DGRAM, 0));
    MUST(fchown(udp, 9, 10));
    memory = MUST(memfd_create("owned", 0));
    MUST(fchown(memory, 11, 12));
    wl_serve(verify);
    return 0;
}

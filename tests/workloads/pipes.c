/* Pipes: content, capacity, full ones, flags of each end, ends that are closed, a named pipe, and one between two processes. */
#include "workload.h"
#include <poll.h>

static int some[2], full[2], large[2], widowed[2], orphaned[2], packets[2], fifo_read, fifo_write, to_child[2], from_child[2], both[2], extra;
static unsigned char content[200000];

static void set_flag(int fd, int flag) { MUST(fcntl(fd, F_SETFL, MUST(fcntl(fd, F_GETFL)) | flag)); }

static void put(int fd, size_t length, uint64_t seed) {
    wl_fill(content, length, seed);
    size_t done = 0;
    while (done < length) {
        ssize_t n = write(fd, content + done, length - done);
        if (n < 0) {
            wl_differs("write: %s", strerror(errno));
            return;
        }
        done += (size_t)n;
    }
}

static void expect(const char *what, int fd, size_t length, uint64_t seed) {
    int waiting = 0;
    MUST(syscall(SYS_ioctl, fd, 0x541B /* FIONREAD */, &waiting));
    CHECK((size_t)waiting == length, "%s: %d bytes, were %zu", what, waiting, length);
    size_t done = 0;
    while (done < (size_t)waiting) {
        ssize_t n = read(fd, content + done, (size_t)waiting - done);
        if (n <= 0) {
            wl_differs("%s: read: %s", what, n ? strerror(errno) : "end of file");
            return;
        }
        done += (size_t)n;
    }
    CHECK(wl_wrong(content, done, seed) == -1, "%s: byte %ld", what, wl_wrong(content, done, seed));
}

static void verify(void) {
    expect("pipe", some[0], 5001, 1);
    put(some[1], 5001, 1);
    CHECK(fcntl(some[0], F_GETPIPE_SZ) == 65536, "pipe: capacity %d", fcntl(some[0], F_GETPIPE_SZ));

    CHECK(write(full[1], "x", 1) == -1 && errno == EAGAIN, "full pipe: a write goes through");
    expect("full pipe", full[0], 65536, 2);
    put(full[1], 65536, 2);

    CHECK(fcntl(large[1], F_GETPIPE_SZ) == 262144, "large pipe: capacity %d", fcntl(large[1], F_GETPIPE_SZ));
    expect("large pipe", large[0], 150000, 3);
    put(large[1], 150000, 3);

    CHECK((fcntl(large[0], F_GETFL) & O_NONBLOCK) && !(fcntl(large[1], F_GETFL) & O_NONBLOCK), "O_NONBLOCK belongs to one end only");

    struct pollfd p = {widowed[0], POLLIN, 0};
    poll(&p, 1, 0);
    CHECK(p.revents == (POLLIN | POLLHUP), "pipe without writer: poll gives %x", p.revents);
    char b[16];
    /* what it holds can be read only once: read it, then give the next round a new one of the same numbers */
    ssize_t n = read(widowed[0], b, sizeof b);
    CHECK(n == 4 && !memcmp(b, "last", 4), "pipe without writer: %zd bytes", n);
    n = read(widowed[0], b, sizeof b);
    CHECK(n == 0, "pipe without writer: no end of file: %zd", n);
    int fresh[2];
    MUST(pipe(fresh));
    MUST(write(fresh[1], "last", 4));
    MUST(dup2(fresh[0], widowed[0]));
    close(fresh[0]);
    close(fresh[1]);

    CHECK(write(orphaned[1], "x", 1) == -1 && errno == EPIPE, "pipe without reader: %s", strerror(errno));

    n = read(packets[0], b, sizeof b);
    CHECK(n == 3 && !memcmp(b, "one", 3), "packet pipe: first packet has %zd bytes", n);
    n = read(packets[0], b, 2);
    CHECK(n == 2 && !memcmp(b, "se", 2), "packet pipe: second packet has %zd bytes", n);
    n = read(packets[0], b, sizeof b);
    CHECK(n == 5 && !memcmp(b, "third", 5), "packet pipe: third packet has %zd bytes", n);
    MUST(write(packets[1], "one", 3));
    MUST(write(packets[1], "second", 6));
    MUST(write(packets[1], "third", 5));

    expect("named pipe", fifo_read, 100, 6);
    put(fifo_write, 100, 6);

    MUST(write(to_child[1], "ping", 4));
    n = read(from_child[0], b, sizeof b);
    CHECK(n == 4 && !memcmp(b, "gnip", 4), "the child answers %zd bytes", n);

    MUST(write(extra, "dup", 3));
    n = read(both[0], b, sizeof b);
    CHECK(n == 3 && !memcmp(b, "dup", 3), "the dup of an end is another pipe");
}

int main(void) {
    wl_init();
    signal(SIGPIPE, SIG_IGN);
    MUST(pipe(some));
    put(some[1], 5001, 1);
    MUST(pipe(full));
    put(full[1], 65536, 2);
    set_flag(full[1], O_NONBLOCK);
    MUST(pipe2(large, O_CLOEXEC));
    MUST(fcntl(large[1], F_SETPIPE_SZ, 262144));
    put(large[1], 150000, 3);
    set_flag(large[0], O_NONBLOCK);
    MUST(pipe(widowed));
    MUST(write(widowed[1], "last", 4));
    close(widowed[1]);
    MUST(pipe(orphaned));
    close(orphaned[0]);
    MUST(pipe2(packets, O_DIRECT));
    MUST(write(packets[1], "one", 3));
    MUST(write(packets[1], "second", 6));
    MUST(write(packets[1], "third", 5));
    unlink("/wl/fifo");
    MUST(mkfifo("/wl/fifo", 0600));
    fifo_read = MUST(open("/wl/fifo", O_RDONLY | O_NONBLOCK));
    fifo_write = MUST(open("/wl/fifo", O_WRONLY));
    put(fifo_write, 100, 6);
    MUST(pipe(both));
    extra = MUST(dup(both[1]));
    MUST(pipe(to_child));
    MUST(pipe(from_child));
    if (!MUST(fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        char b[4];
        while (read(to_child[0], b, 4) == 4) {
            char back[4] = {b[3], b[2], b[1], b[0]};
            MUST(write(from_child[1], back, 4));
        }
        _exit(9);
    }
    wl_serve(verify);
}

/* Pseudo-terminals made inside: both ends in every mix, modes, size, packet mode, locks, numbers with gaps, a session with its
 * controlling terminal and foreground group, /dev/tty, an end whose other end is closed. */
#include "workload.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

static int raw_master, raw_slave, raw_again, lines_master, lines_slave, alone, widowed, hung_up, packets, packets_slave, locked;
static int session_master, *shared;
static pid_t leader, job;
static int numbers[8];

static int open_master(int *number) {
    int fd = MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC));
    int unlock = 0;
    MUST(ioctl(fd, TIOCSPTLCK, &unlock));
    MUST(ioctl(fd, TIOCGPTN, number));
    return fd;
}

static int open_slave(int number, int flags) {
    char path[32];
    sprintf(path, "/dev/pts/%d", number);
    return MUST(open(path, flags | O_NOCTTY | O_CLOEXEC));
}

static void resize(int fd, int rows, int columns) {
    struct winsize size = {(unsigned short)rows, (unsigned short)columns, 7, 9};
    MUST(ioctl(fd, TIOCSWINSZ, &size));
}

static void pass(const char *what, int from, int to, const char *text, const char *wanted) {
    char got[64] = "";
    size_t length = strlen(wanted);
    CHECK(write(from, text, strlen(text)) == (ssize_t)strlen(text), "%s: write: %s", what, strerror(errno));
    size_t done = 0;
    struct pollfd p = {to, POLLIN, 0};
    while (done < length && poll(&p, 1, 5000) == 1) {
        ssize_t n = read(to, got + done, length - done);
        if (n <= 0) break;
        done += (size_t)n;
    }
    CHECK(done == length && !memcmp(got, wanted, length), "%s: got %zu bytes, `%s`", what, done, got);
}

static int ready(int fd) {
    struct pollfd p = {fd, POLLIN | POLLOUT, 0};
    poll(&p, 1, 0);
    return p.revents;
}

static void verify_session(void) {
    int sid = 0, group = 0;
    CHECK(ioctl(session_master, TIOCGSID, &sid) == 0 && sid == leader, "session: the terminal's is %d, was %d", sid, leader);
    CHECK(ioctl(session_master, TIOCGPGRP, &group) == 0 && group == job, "session: the foreground is %d, was %d", group, job);
    /* Ctrl-\ goes to the foreground group, which counts it */
    int before = __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST);
    CHECK(write(session_master, "\x1c", 1) == 1, "session: Ctrl-\\");
    for (int i = 0; i < 500 && __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST) == before; i++) wl_sleep(0.01);
    CHECK(__atomic_load_n(&shared[0], __ATOMIC_SEQ_CST) == before + 1, "session: Ctrl-\\ came %d times", shared[0] - before);
    /* the job writes to what it has open as /dev/tty */
    char got[8] = "";
    struct pollfd p = {session_master, POLLIN, 0};
    CHECK(poll(&p, 1, 5000) == 1 && read(session_master, got, 4) == 4 && !memcmp(got, "hey\n", 4), "session: the job says `%s`", got);
    CHECK(shared[1] == 0, "session: %d signals that nobody sent", shared[1]);
}

static void verify(void) {
    struct termios t;
    struct winsize size;
    int value;
    static const int *const masters[] = {&raw_master, &lines_master, &alone, &widowed, &packets, &locked, &session_master};
    for (int i = 0; i < 7; i++) {
        CHECK(ioctl(*masters[i], TIOCGPTN, &value) == 0 && value == numbers[i], "number %d is %d now", numbers[i], value);
    }
    MUST(tcgetattr(raw_slave, &t));
    CHECK(!(t.c_lflag & ICANON) && cfgetospeed(&t) == B9600 && t.c_cc[VMIN] == 3, "raw: its modes differ");
    CHECK(ioctl(raw_slave, TIOCGWINSZ, &size) == 0 && size.ws_row == 33 && size.ws_col == 101 && size.ws_ypixel == 9, "raw: %dx%d",
          size.ws_row, size.ws_col);
    CHECK(fcntl(raw_again, F_GETFL) & O_NONBLOCK && !(fcntl(raw_slave, F_GETFL) & O_NONBLOCK), "raw: O_NONBLOCK of one description");
    pass("raw, from the master", raw_master, raw_slave, "abc", "abc");
    pass("raw, to the master", raw_slave, raw_master, "x\ny", "x\ny");
    pass("raw, from the second", raw_again, raw_master, "again", "again");

    MUST(tcgetattr(lines_slave, &t));
    CHECK(t.c_lflag & ICANON && !(t.c_lflag & ECHO) && t.c_cc[VERASE] == '#', "lines: its modes differ");
    pass("lines", lines_master, lines_slave, "wrogn##ng\n", "wrong\n");

    CHECK(ready(alone) == POLLOUT, "a master whose slave was never open: poll gives %x", ready(alone));
    CHECK(ready(widowed) & POLLHUP, "a master whose slave is closed: poll gives %x", ready(widowed));
    char b[8];
    CHECK(ready(hung_up) & POLLHUP, "a slave without a master: poll gives %x", ready(hung_up));
    CHECK(read(hung_up, b, 1) == 0, "a slave without a master: it can be read");
    CHECK(write(hung_up, "x", 1) == -1 && errno == EIO, "a slave without a master: it can be written");

    CHECK(ioctl(packets, TIOCGPKT, &value) == 0 && value, "packet mode is off");
    char packet[8] = "";
    CHECK(write(packets_slave, "pkt", 3) == 3 && read(packets, packet, 8) == 4 && !memcmp(packet, "\0pkt", 4), "packet: `%s`", packet + 1);
    CHECK(ioctl(locked, TIOCGPTLCK, &value) == 0 && value, "it is not locked any more");
    CHECK(ioctl(locked, TIOCGEXCL, &value) == 0 && value, "it is not exclusive any more");
    verify_session();
}

static void count(int signal) { __atomic_add_fetch(&shared[signal != SIGQUIT], 1, __ATOMIC_SEQ_CST); }

/* A session whose leader has a terminal, and a job in its foreground. */
static void session(int number, int *to_parent) {
    char path[32];
    sprintf(path, "/dev/pts/%d", number);
    MUST(setsid());
    int fd = MUST(open(path, O_RDWR));
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    MUST(sigaction(SIGTTOU, &ignore, NULL));
    pid_t child = MUST(fork());
    if (child == 0) {
        close(fd);
        MUST(setpgid(0, 0));
        int tty = MUST(open("/dev/tty", O_WRONLY));
        MUST(tcsetpgrp(tty, getpid()));
        struct sigaction sa = {.sa_handler = count};
        MUST(sigaction(SIGQUIT, &sa, NULL));
        MUST(sigaction(SIGHUP, &sa, NULL));
        MUST(sigaction(SIGWINCH, &sa, NULL));
        MUST(sigaction(SIGCONT, &sa, NULL));
        int seen = 0;
        pid_t me = getpid();
        MUST(write(to_parent[1], &me, sizeof me));
        for (;;) {
            wl_sleep(0.005);
            int now = __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST);
            if (now != seen) MUST(write(tty, "hey\n", 4));
            seen = now;
        }
    }
    for (;;) pause();
}

int main(void) {
    wl_init();
    struct termios t;
    int number, one = 1;
    shared = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int first = open_master(&number), gap;

    raw_master = open_master(&numbers[0]);
    raw_slave = open_slave(numbers[0], O_RDWR);
    raw_again = open_slave(numbers[0], O_WRONLY | O_NONBLOCK);
    MUST(tcgetattr(raw_slave, &t));
    cfmakeraw(&t);
    cfsetospeed(&t, B9600);
    t.c_cc[VMIN] = 3;
    MUST(tcsetattr(raw_slave, TCSANOW, &t));
    resize(raw_slave, 33, 101);

    lines_master = open_master(&numbers[1]);
    lines_slave = open_slave(numbers[1], O_RDWR);
    MUST(tcgetattr(lines_slave, &t));
    t.c_lflag &= ~(tcflag_t)ECHO;
    t.c_cc[VERASE] = '#';
    MUST(tcsetattr(lines_slave, TCSANOW, &t));
    gap = open_master(&number);

    alone = open_master(&numbers[2]);
    widowed = open_master(&numbers[3]);
    close(open_slave(numbers[3], O_RDWR));
    int dead = open_master(&number);
    hung_up = open_slave(number, O_RDWR);
    close(dead);

    packets = open_master(&numbers[4]);
    packets_slave = open_slave(numbers[4], O_RDWR);
    MUST(tcgetattr(packets_slave, &t));
    cfmakeraw(&t);
    MUST(tcsetattr(packets_slave, TCSANOW, &t));
    MUST(ioctl(packets, TIOCPKT, &one));
    locked = open_master(&numbers[5]);
    MUST(ioctl(locked, TIOCEXCL));
    MUST(ioctl(locked, TIOCSPTLCK, &one));

    session_master = open_master(&numbers[6]);
    int keep = open_slave(numbers[6], O_RDWR);
    MUST(tcgetattr(keep, &t));
    t.c_lflag &= ~(tcflag_t)(ECHO | ECHOCTL);
    t.c_oflag &= ~(tcflag_t)OPOST;
    MUST(tcsetattr(keep, TCSANOW, &t));
    int told[2];
    MUST(pipe(told));
    leader = MUST(fork());
    if (leader == 0) {
        close(keep);
        session(numbers[6], told);
    }
    MUST(read(told[0], &job, sizeof job));
    close(told[0]);
    close(told[1]);
    close(keep);
    close(first);
    close(gap);
    wl_serve(verify);
}

/* inotify: watches of files and directories with their numbers and masks, and what they tell from then on. No event may be one of torpor's. */
#include "workload.h"
#include <sys/inotify.h>

#define DIR_ "/tmp/watches"
static int in, second, wd_dir, wd_file, wd_once, wd_mount, wd_second;
static char *listed[2];

/* Numbers and masks of all watches; inode and device of a tmpfs are new after a restore. */
static char *list(int fd) {
    char path[64], *save = NULL;
    sprintf(path, "/proc/self/fdinfo/%d", fd);
    char *text = wl_slurp(path, NULL), *out = calloc(1, 8192);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        if (!strncmp(line, "inotify", 7)) {
            char *wd = strstr(line, "wd:"), *mask = strstr(line, "mask:");
            sprintf(out + strlen(out), "%.*s %.*s|", (int)strcspn(wd, " "), wd, (int)strcspn(mask, " "), mask);
        }
    free(text);
    return out;
}

static void expect(int fd, int wd, uint32_t mask, const char *name) {
    static char buffer[2][4096];
    static ssize_t have[2], at[2];
    int which = fd == second;
    if (at[which] >= have[which]) {
        have[which] = read(fd, buffer[which], sizeof buffer[which]);
        at[which] = 0;
        if (have[which] <= 0) {
            wl_differs("inotify: no event %x of watch %d", mask, wd);
            return;
        }
    }
    struct inotify_event *e = (struct inotify_event *)(buffer[which] + at[which]);
    at[which] += (ssize_t)(sizeof *e + e->len);
    CHECK(e->wd == wd && e->mask == mask && !strcmp(e->len ? e->name : "", name), "inotify: event %x of watch %d (%s) instead of %x of %d (%s)",
          e->mask, e->wd, e->len ? e->name : "", mask, wd, name);
}

static void none(int fd) {
    char buffer[4096];
    ssize_t n = read(fd, buffer, sizeof buffer);
    struct inotify_event *e = (struct inotify_event *)buffer;
    CHECK(n == -1 && errno == EAGAIN, "inotify: an event that nobody made: %x of watch %d (%s)", n > 0 ? e->mask : 0, n > 0 ? e->wd : 0,
          n > 0 && e->len ? e->name : "");
}

static void verify(void) {
    char *now[2] = {list(in), list(second)};
    for (int i = 0; i < 2; i++) {
        CHECK(!strcmp(now[i], listed[i]), "inotify %d: %s instead of %s", i, now[i], listed[i]);
        free(now[i]);
    }
    none(in);
    none(second);
    int f = MUST(open(DIR_ "/new", O_CREAT | O_WRONLY, 0600));
    close(f);
    MUST(unlink(DIR_ "/new"));
    expect(in, wd_dir, IN_CREATE, "new");
    expect(in, wd_dir, IN_DELETE, "new");
    f = MUST(open(DIR_ "/file", O_WRONLY | O_TRUNC));
    MUST(write(f, "x", 1));
    close(f);
    expect(in, wd_file, IN_MODIFY, "");
    f = MUST(open("/dev/shm/x", O_CREAT | O_WRONLY, 0600));
    close(f);
    MUST(unlink("/dev/shm/x"));
    expect(in, wd_mount, IN_CREATE, "x");
    f = MUST(open(DIR_ "/sub/y", O_CREAT | O_WRONLY, 0600));
    close(f);
    MUST(unlink(DIR_ "/sub/y"));
    expect(second, wd_second, IN_CREATE, "y");
    none(in);
    none(second);
    CHECK(fcntl(in, F_GETFL) & O_NONBLOCK, "inotify: blocks");
    /* one of its own goes and comes, and numbers are not used twice */
    int wd = MUST(inotify_add_watch(in, "/proc", IN_CREATE));
    CHECK(wd != wd_dir && wd != wd_file && wd != wd_once && wd != wd_mount, "inotify: number %d is given twice", wd);
    MUST(inotify_rm_watch(in, wd));
    expect(in, wd, IN_IGNORED, "");
}

int main(void) {
    wl_init();
    mkdir("/tmp", 0777);
    mkdir(DIR_, 0700);
    mkdir(DIR_ "/sub", 0700);
    mkdir(DIR_ "/once", 0700);
    int f = MUST(open(DIR_ "/file", O_CREAT | O_WRONLY, 0600));
    in = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    second = MUST(inotify_init1(IN_NONBLOCK));
    for (int i = 0; i < 40; i++) inotify_rm_watch(in, MUST(inotify_add_watch(in, "/proc", IN_CREATE)));
    wd_dir = MUST(inotify_add_watch(in, DIR_, IN_CREATE | IN_DELETE | IN_EXCL_UNLINK));
    for (int i = 0; i < 5; i++) inotify_rm_watch(in, MUST(inotify_add_watch(in, "/proc", IN_CREATE)));
    wd_file = MUST(inotify_add_watch(in, DIR_ "/file", IN_MODIFY));
    wd_once = MUST(inotify_add_watch(in, DIR_ "/once", IN_CREATE | IN_DELETE_SELF | IN_ONESHOT));
    wd_mount = MUST(inotify_add_watch(in, "/dev/shm", IN_CREATE));
    wd_second = MUST(inotify_add_watch(second, DIR_ "/sub", IN_CREATE));
    MUST(inotify_add_watch(second, "/bin", IN_CREATE | IN_DELETE | IN_MOVE | IN_CLOSE_WRITE | IN_MODIFY | IN_ATTRIB));
    char buffer[4096];
    while (read(in, buffer, sizeof buffer) > 0) {}
    (void)f;
    listed[0] = list(in);
    listed[1] = list(second);
    wl_serve(verify);
}

/* Mappings whose file is not what a name leads to: a memfd that can never be executed, /dev/zero mapped shared and private, a file that was
 * replaced under its name after it had been mapped, one that was removed; and arguments that were rewritten (setproctitle). */
#include "workload.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif
#define F_SEAL_EXEC_ 0x20
#define SIZE 20000

static int noexec, has_noexec;
static unsigned char *shared_zero, *private_zero, *replaced, *removed;
static char title[64];

static unsigned char *map_file(const char *path, uint64_t seed, int shared) {
    int fd = MUST(open(path, O_CREAT | O_EXCL | O_RDWR, 0600));
    unsigned char bytes[SIZE];
    wl_fill(bytes, SIZE, seed);
    MUST(write(fd, bytes, SIZE));
    unsigned char *at = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, shared ? MAP_SHARED : MAP_PRIVATE, fd, 0));
    close(fd);
    return at;
}

static void check_title(void) {
    size_t length;
    char *text = wl_slurp("/proc/self/cmdline", &length);
    CHECK(!strncmp(text, title, strlen(title)), "the arguments are %.40s", text);
    free(text);
}

static void verify(void) {
    if (has_noexec) {
        struct stat s;
        MUST(fstat(noexec, &s));
        CHECK((s.st_mode & 07777) == 0666, "mode %o of what cannot be executed", s.st_mode & 07777);
        CHECK(fcntl(noexec, F_GET_SEALS) == F_SEAL_EXEC_, "seals %x", fcntl(noexec, F_GET_SEALS));
        CHECK(fchmod(noexec, 0755) == -1 && errno == EPERM, "it can be made executable");
    }
    CHECK(wl_wrong(shared_zero, SIZE, 1) == -1, "/dev/zero, shared: byte %ld", wl_wrong(shared_zero, SIZE, 1));
    CHECK(wl_wrong(private_zero, SIZE, 2) == -1, "/dev/zero, private: byte %ld", wl_wrong(private_zero, SIZE, 2));
    CHECK(wl_wrong(replaced, SIZE, 3) == -1, "the replaced file: byte %ld", wl_wrong(replaced, SIZE, 3));
    CHECK(wl_wrong(removed, SIZE, 4) == -1, "the removed file: byte %ld", wl_wrong(removed, SIZE, 4));
    int fd = MUST(open("/replaced", O_RDONLY));
    unsigned char bytes[SIZE];
    CHECK(read(fd, bytes, SIZE) == SIZE && wl_wrong(bytes, SIZE, 5) == -1, "the name of the replaced file leads to other content");
    close(fd);
    pid_t child = MUST(fork());
    if (!child) {
        shared_zero[7] ^= 1;
        private_zero[7] ^= 1;
        _exit(0);
    }
    MUST(waitpid(child, NULL, 0));
    CHECK(shared_zero[7] == (wl_byte(1, 7) ^ 1), "/dev/zero, shared, is not shared");
    CHECK(private_zero[7] == wl_byte(2, 7), "/dev/zero, private, is shared");
    shared_zero[7] ^= 1;
    check_title();
}

int main(int argc, char **argv) {
    wl_init();
    noexec = memfd_create("noexec", MFD_NOEXEC_SEAL | MFD_CLOEXEC);
    has_noexec = noexec != -1; /* Linux 6.3 */
    int zero = MUST(open("/dev/zero", O_RDWR));
    shared_zero = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, zero, 0));
    private_zero = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0));
    close(zero);
    wl_fill(shared_zero, SIZE, 1);
    wl_fill(private_zero, SIZE, 2);
    replaced = map_file("/replaced", 3, 0);
    MUST(munmap(map_file("/new", 5, 0), SIZE));
    MUST(rename("/new", "/replaced"));
    removed = map_file("/removed", 4, 1);
    MUST(unlink("/removed"));
    /* over the arguments, as setproctitle(3) does it */
    (void)argc;
    snprintf(title, sizeof title, "mapped: title");
    memset(argv[0], 0, strlen(argv[0]));
    size_t room = strlen("/bin/mapped a-long-argument-that-makes-room");
    memset(argv[0], 0, room);
    memcpy(argv[0], title, strlen(title));
    wl_serve(verify);
}

/* memfd: content, offset, seals, flags; mapped shared and private; open twice as one description and as two. */
#include "workload.h"

static int fd, same, other, sealed;
static unsigned char *mapped, *copied;
#define SIZE 300000
static char *names[2];

static char *name_of(int f) {
    static char path[64], text[256];
    sprintf(path, "/proc/self/fd/%d", f);
    ssize_t n = readlink(path, text, sizeof text - 1);
    text[n < 0 ? 0 : n] = 0;
    return strdup(text);
}

static void verify(void) {
    unsigned char *bytes = malloc(SIZE);
    CHECK(pread(fd, bytes, SIZE, 0) == SIZE && wl_wrong(bytes, SIZE, 1) == -1, "content");
    free(bytes);
    CHECK(wl_wrong(mapped, SIZE, 1) == -1, "shared mapping: byte %ld", wl_wrong(mapped, SIZE, 1));
    CHECK(wl_wrong(copied, SIZE, 2) == -1, "private mapping: byte %ld", wl_wrong(copied, SIZE, 2));
    struct stat s;
    MUST(fstat(fd, &s));
    CHECK(s.st_size == SIZE && s.st_nlink == 0, "size %ld, links %lu", s.st_size, s.st_nlink);
    CHECK(lseek(fd, 0, SEEK_CUR) == 1234, "offset %ld", lseek(fd, 0, SEEK_CUR));
    lseek(fd, 77, SEEK_SET);
    CHECK(lseek(same, 0, SEEK_CUR) == 77, "the dup has another offset");
    lseek(fd, 1234, SEEK_SET);
    CHECK(lseek(other, 0, SEEK_CUR) == 9, "the second opening: offset %ld", lseek(other, 0, SEEK_CUR));
    CHECK((fcntl(other, F_GETFL) & O_ACCMODE) == O_RDONLY, "the second opening: flags %x", fcntl(other, F_GETFL));
    unsigned char b = mapped[10], x = b ^ 1;
    MUST(pwrite(fd, &x, 1, 10));
    CHECK(mapped[10] == x, "mapping and file are two");
    CHECK(pread(other, &x, 1, 10) == 1 && x == (b ^ 1), "the second opening is another file");
    mapped[10] = b;
    CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) && !(fcntl(same, F_GETFD) & FD_CLOEXEC), "close-on-exec flags");
    CHECK(fcntl(sealed, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL), "seals %x", fcntl(sealed, F_GET_SEALS));
    CHECK(write(sealed, "x", 1) == -1 && errno == EPERM, "a sealed memfd can be written");
    char text[16] = "";
    CHECK(pread(sealed, text, 5, 0) == 5 && !memcmp(text, "final", 5), "content of the sealed one: %s", text);
    CHECK(fcntl(fd, F_GET_SEALS) == 0, "seals of the first: %x", fcntl(fd, F_GET_SEALS));
    char *now = name_of(fd);
    CHECK(!strcmp(now, names[0]), "name %s, was %s", now, names[0]);
    free(now);
    now = name_of(sealed);
    CHECK(!strcmp(now, names[1]), "name %s, was %s", now, names[1]);
    free(now);
}

int main(void) {
    wl_init();
    fd = MUST(memfd_create("first one", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    unsigned char *bytes = malloc(SIZE);
    wl_fill(bytes, SIZE, 1);
    MUST(write(fd, bytes, SIZE));
    mapped = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    copied = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    wl_fill(copied, SIZE, 2);
    same = MUST(dup(fd));
    lseek(fd, 1234, SEEK_SET);
    char path[64];
    sprintf(path, "/proc/self/fd/%d", fd);
    other = MUST(open(path, O_RDONLY));
    lseek(other, 9, SEEK_SET);
    sealed = MUST(memfd_create("sealed", MFD_ALLOW_SEALING));
    MUST(write(sealed, "final", 5));
    MUST(fcntl(sealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL));
    names[0] = name_of(fd);
    names[1] = name_of(sealed);
    wl_serve(verify);
}

/* Deleted files that are still open: content, offset, flags, mapped shared and private, open twice; and an empty one. */
#include "workload.h"

#define SIZE 200000
static int gone, gone_too, appended, empty;
static unsigned char *mapped;

static void verify(void) {
    unsigned char *bytes = calloc(1, SIZE);
    CHECK(pread(gone, bytes, SIZE, 0) == SIZE && wl_wrong(bytes, SIZE, 5) == -1, "content: byte %ld", wl_wrong(bytes, SIZE, 5));
    CHECK(lseek(gone, 0, SEEK_CUR) == 4242, "offset %ld", lseek(gone, 0, SEEK_CUR));
    CHECK(wl_wrong(mapped, SIZE, 5) == -1, "mapping: byte %ld", wl_wrong(mapped, SIZE, 5));
    struct stat a, b;
    MUST(fstat(gone, &a));
    MUST(fstat(gone_too, &b));
    CHECK(a.st_nlink == 0 && a.st_size == SIZE && (a.st_mode & 07777) == 0640, "links %lu size %ld mode %o", a.st_nlink, a.st_size, a.st_mode);
    CHECK(a.st_ino == b.st_ino, "two openings are two files");
    CHECK(lseek(gone_too, 0, SEEK_CUR) == 7 && (fcntl(gone_too, F_GETFL) & O_ACCMODE) == O_RDONLY, "the second opening");
    unsigned char x = mapped[100] ^ 1;
    MUST(pwrite(gone, &x, 1, 100));
    CHECK(mapped[100] == x, "mapping and file are two");
    CHECK(pread(gone_too, bytes, 1, 100) == 1 && bytes[0] == x, "the second opening has another content");
    mapped[100] ^= 1;
    CHECK(access("/wl/gone", F_OK) == -1 && errno == ENOENT, "the deleted file is back");
    off_t end = lseek(appended, 0, SEEK_END);
    lseek(appended, 0, SEEK_SET);
    MUST(write(appended, "more", 4));
    CHECK(lseek(appended, 0, SEEK_CUR) == end + 4, "O_APPEND is lost");
    MUST(ftruncate(appended, end));
    memset(bytes, 0, 16);
    CHECK(pread(appended, bytes, 5, 0) == 5 && !memcmp(bytes, "start", 5), "content of the appended one: %.5s", bytes);
    MUST(fstat(empty, &a));
    CHECK(a.st_size == 0 && a.st_nlink == 0, "the empty one: size %ld links %lu", a.st_size, a.st_nlink);
    free(bytes);
}

int main(void) {
    wl_init();
    gone = MUST(open("/wl/gone", O_CREAT | O_TRUNC | O_RDWR, 0640));
    unsigned char *bytes = malloc(SIZE);
    wl_fill(bytes, SIZE, 5);
    MUST(write(gone, bytes, SIZE));
    lseek(gone, 4242, SEEK_SET);
    gone_too = MUST(open("/wl/gone", O_RDONLY));
    lseek(gone_too, 7, SEEK_SET);
    mapped = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0));
    MUST(unlink("/wl/gone"));
    appended = MUST(open("/wl/appended", O_CREAT | O_TRUNC | O_RDWR | O_APPEND, 0600));
    MUST(write(appended, "start", 5));
    MUST(unlink("/wl/appended"));
    empty = MUST(open("/wl/empty", O_CREAT | O_TRUNC | O_RDWR, 0600));
    MUST(unlink("/wl/empty"));
    wl_serve(verify);
}

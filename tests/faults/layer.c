/* A file layer that fails, for the tests: loaded before the C library (LD_PRELOAD), it sees every call of the program
 * that changes a file or folder below FAULT_ROOT, numbers them from 1, and lets number FAULT_AT go wrong.
 *
 * FAULT_MODE   once   that call fails and does nothing; what comes after works again
 *              full   the disk is full from that call on: it writes half of its bytes, and no later one writes any
 *              power  the power fails at that call: files that were not brought to disk lose their second half, renames
 *                     in folders that were not brought to disk are undone, and the process ends with status 137
 * FAULT_LIST   a file that gets one line for each call: its kind and path
 *
 * Numbers are those of one run with one thread; with several they still fall on some call.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((typeof(&name))real(#name))
#define MOST 4096

enum verdict { GO, FAIL, HALF };

struct rename { char from[PATH_MAX], to[PATH_MAX]; int lasting; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static const char *mode = "";
static long at = -1, count;
static int list = -1, full, ready;
static char dirty[MOST][PATH_MAX];
static struct rename renames[MOST];
static int dirties, renamed;

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static void prepare(void) {
    if (ready) return;
    ready = 1;
    const char *text = getenv("FAULT_ROOT");
    if (!text) return;
    snprintf(root, sizeof root, "%s", text);
    if ((text = getenv("FAULT_AT"))) at = atol(text);
    if ((text = getenv("FAULT_MODE"))) mode = text;
    if ((text = getenv("FAULT_LIST"))) list = syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_CREAT | O_APPEND, 0644);
}

static int below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path of `path` below the folder `dir`, "" if there is none. */
static void absolute(int dir, const char *path, char *out) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            base[n > 0 ? n : 0] = 0;
        }
        strncat(base, "/", sizeof base - strlen(base) - 1);
    }
    strncat(base, path, sizeof base - strlen(base) - 1);
    memcpy(out, base, sizeof base);
}

static void of_file(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
}

static void parent(const char *path, char *out) {
    snprintf(out, PATH_MAX, "%s", path);
    char *slash = strrchr(out, '/');
    if (slash) *slash = 0;
}

static void power_cut(void) {
    for (int i = 0; i < dirties; i++) {
        struct stat meta;
        if (!dirty[i][0] || syscall(SYS_newfstatat, AT_FDCWD, dirty[i], &meta, 0)) continue;
        syscall(SYS_truncate, dirty[i], meta.st_size / 2);
        /* Every second one keeps its length, with zeros: both are seen. */
        if (i % 2) syscall(SYS_truncate, dirty[i], meta.st_size);
    }
    for (int i = renamed - 1; i >= 0; i--)
        if (!renames[i].lasting) syscall(SYS_renameat2, AT_FDCWD, renames[i].to, AT_FDCWD, renames[i].from, 0);
    syscall(SYS_exit_group, 137);
}

/* Counts a call and judges it. The lock is held. */
static enum verdict judge(const char *kind, const char *path, int writes) {
    prepare();
    if (!below(path)) return GO;
    count++;
    if (list >= 0) {
        char line[PATH_MAX + 32];
        int n = snprintf(line, sizeof line, "%s %s\n", kind, path + strlen(root));
        syscall(SYS_write, list, line, (size_t)n);
    }
    if (!strcmp(mode, "full")) {
        if (!writes) return GO;
        if (full) return FAIL;
        if (count < at || at < 1) return GO;
        full = 1;
        return HALF;
    }
    if (count != at) return GO;
    if (!strcmp(mode, "power")) power_cut();
    return FAIL;
}

static void soil(const char *path) {
    if (!below(path)) return;
    for (int i = 0; i < dirties; i++)
        if (!strcmp(dirty[i], path)) return;
    if (dirties < MOST) snprintf(dirty[dirties++], PATH_MAX, "%s", path);
}

/* A file or a folder reached the disk. */
static void settle(const char *path) {
    char folder[PATH_MAX];
    for (int i = 0; i < dirties; i++)
        if (!strcmp(dirty[i], path)) dirty[i][0] = 0;
    for (int i = 0; i < renamed; i++) {
        parent(renames[i].to, folder);
        if (!strcmp(folder, path)) renames[i].lasting = 1;
    }
}

static enum verdict on_file(const char *kind, int fd) {
    char path[PATH_MAX];
    int before = errno;
    of_file(fd, path);
    pthread_mutex_lock(&lock);
    enum verdict verdict = judge(kind, path, 1);
    if (verdict != FAIL) soil(path);
    pthread_mutex_unlock(&lock);
    errno = before;
    if (verdict == FAIL) errno = ENOSPC;
    return verdict;
}

static enum verdict on_path(const char *kind, int dir, const char *name, int writes, int error) {
    char path[PATH_MAX];
    int before = errno;
    absolute(dir, name, path);
    pthread_mutex_lock(&lock);
    enum verdict verdict = judge(kind, path, writes);
    pthread_mutex_unlock(&lock);
    errno = before;
    /* There is no half of a name. */
    if (verdict == HALF) verdict = FAIL;
    if (verdict == FAIL) errno = error;
    return verdict;
}

ssize_t write(int fd, const void *data, size_t n) {
    enum verdict verdict = on_file("write", fd);
    if (verdict == FAIL) return -1;
    return REAL(write)(fd, data, verdict == HALF ? (n + 1) / 2 : n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    enum verdict verdict = on_file("write", fd);
    if (verdict == FAIL) return -1;
    return REAL(writev)(fd, parts, verdict == HALF ? (n + 1) / 2 : n);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
    enum verdict verdict = on_file("write", fd);
    if (verdict == FAIL) return -1;
    return REAL(pwrite64)(fd, data, verdict == HALF ? (n + 1) / 2 : n, offset);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) { return pwrite64(fd, data, n, offset); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    enum verdict verdict = on_file("write", out);
    if (verdict == FAIL) return -1;
    return REAL(copy_file_range)(in, from, out, to, verdict == HALF ? 1 : n, flags);
}

ssize_t sendfile64(int out, int in, off64_t *from, size_t n) {
    enum verdict verdict = on_file("write", out);
    if (verdict == FAIL) return -1;
    return REAL(sendfile64)(out, in, from, verdict == HALF ? 1 : n);
}

ssize_t sendfile(int out, int in, off_t *from, size_t n) { return sendfile64(out, in, from, n); }

int ftruncate64(int fd, off64_t length) {
    if (on_file("size", fd) == GO) return REAL(ftruncate64)(fd, length);
    /* There is no half of a size. */
    errno = ENOSPC;
    return -1;
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

static int sync_with(const char *name, int fd) {
    char path[PATH_MAX];
    of_file(fd, path);
    pthread_mutex_lock(&lock);
    enum verdict verdict = judge("sync", path, 0);
    if (verdict == GO) settle(path);
    pthread_mutex_unlock(&lock);
    if (verdict != GO) {
        errno = EIO;
        return -1;
    }
    return ((int (*)(int))real(name))(fd);
}

int fsync(int fd) { return sync_with("fsync", fd); }

int fdatasync(int fd) { return sync_with("fdatasync", fd); }

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    struct stat meta;
    absolute(from_dir, from, old);
    absolute(to_dir, to, new);
    pthread_mutex_lock(&lock);
    enum verdict verdict = judge("rename", new, 0);
    int result = -1;
    errno = EXDEV;
    if (verdict == GO) {
        int replaces = !syscall(SYS_newfstatat, AT_FDCWD, new, &meta, AT_SYMLINK_NOFOLLOW);
        result = (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
        if (!result && below(new)) {
            for (int i = 0; i < dirties; i++)
                if (!strcmp(dirty[i], old)) memcpy(dirty[i], new, sizeof new);
            if (!replaces && renamed < MOST) {
                struct rename *entry = &renames[renamed++];
                memcpy(entry->from, old, sizeof old);
                memcpy(entry->to, new, sizeof new);
                entry->lasting = 0;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return renameat2(from_dir, from, to_dir, to, 0);
}

int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int mkdir(const char *path, mode_t bits) {
    return on_path("mkdir", AT_FDCWD, path, 1, ENOSPC) == GO ? REAL(mkdir)(path, bits) : -1;
}

int unlink(const char *path) { return on_path("remove", AT_FDCWD, path, 0, EIO) == GO ? REAL(unlink)(path) : -1; }

int rmdir(const char *path) { return on_path("remove", AT_FDCWD, path, 0, EIO) == GO ? REAL(rmdir)(path) : -1; }

int unlinkat(int dir, const char *path, int flags) {
    return on_path("remove", dir, path, 0, EIO) == GO ? REAL(unlinkat)(dir, path, flags) : -1;
}

int openat64(int dir, const char *path, int flags, ...) {
    mode_t bits = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        bits = va_arg(rest, mode_t);
        va_end(rest);
    }
    if (flags & (O_CREAT | O_TRUNC) && on_path("create", dir, path, 1, ENOSPC) != GO) return -1;
    return (int)syscall(SYS_openat, dir, path, flags | O_LARGEFILE, bits);
}

#define OPEN(name)                                            \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                \
        return openat64(AT_FDCWD, path, flags, bits);                \
    }

OPEN(open)
OPEN(open64)

int openat(int dir, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return openat64(dir, path, flags, bits);
}

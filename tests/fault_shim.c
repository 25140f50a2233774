/* Preloaded under a test: stops the process at the n-th call that changes a file, and keeps what a power
   cut would leave. Calls on files below `folder` are counted; at call `stop_at` the process is killed before
   the call is made (or, with `torn`, after half of a write). After each fsync the file is copied to `synced`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096], synced[4096];
static long stop_at, count, room = -1;
static int torn;
static char kinds[1 << 16]; /* of the calls, in order: o output, w write-ahead log, d database, a others */

const char *shim_calls(void) { return kinds; }

void shim_arm(const char *where, const char *copies, long n, int half, long bytes) {
    snprintf(folder, sizeof folder, "%s", where);
    snprintf(synced, sizeof synced, "%s", copies);
    stop_at = n;
    torn = half;
    room = bytes; /* what still fits on the "disk"; -1: everything */
    count = 0;
    memset(kinds, 0, sizeof kinds);
}


static int is_ours(const char *path) {
    size_t n = strlen(folder), m = strlen(path);
    return n && strncmp(path, folder, n) == 0 && !(m > 5 && strcmp(path + m - 5, ".lock") == 0);
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = folder[0] ? readlink(link, path, 4095) : -1;
    if (n < 0) return 0;
    path[n] = 0;
    return is_ours(path);
}

static char kind_of(const char *path) {
    const char *name = strrchr(path, '/');
    const char *end = path + strlen(path);
    if (strcmp(end - 4, "-wal") == 0) return 'w';
    if (name && strstr(name, ".state")) return 'd';
    return name && strncmp(name, "/out", 4) == 0 ? 'o' : 'a';
}

static int now(const char *path) {
    if (count < (long)sizeof kinds - 1) kinds[count] = kind_of(path);
    return ++count == stop_at;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t fits(size_t n) {
    if (room < 0) return n;
    if (room == 0) { errno = ENOSPC; return -1; }
    if ((size_t)room < n) n = room;
    room -= n;
    return n;
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    char path[4096];
    if (path_of(fd, path)) {
        if (now(path)) { if (torn) real(fd, data, n / 2); die(); }
        ssize_t taken = fits(n);
        if (taken < 0) return -1;
        n = taken;
    }
    return real(fd, data, n);
}

#define PWRITE(name, offset_t)                                       \
    ssize_t name(int fd, const void *data, size_t n, offset_t at) {  \
        REAL(name);                                                  \
        char path[4096];                                             \
        if (path_of(fd, path)) {                                     \
            if (now(path)) { if (torn) real(fd, data, n / 2, at); die(); } \
            ssize_t taken = fits(n);                                 \
            if (taken < 0) return -1;                                \
            n = taken;                                               \
        }                                                            \
        return real(fd, data, n, at);                                \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_t)               \
    int name(int fd, offset_t length) {        \
        REAL(name);                            \
        char path[4096];                       \
        if (path_of(fd, path) && now(path)) die(); \
        return real(fd, length);               \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

static void copy(const char *path) {
    char target[8300];
    const char *name = strrchr(path, '/');
    if (!synced[0] || !name) return;
    snprintf(target, sizeof target, "%s%s", synced, name);
    FILE *in = fopen(path, "rb"), *out = fopen(target, "wb");
    char buffer[65536];
    size_t n;
    while (in && out && (n = fread(buffer, 1, sizeof buffer, in)) > 0) fwrite(buffer, 1, n, out);
    if (in) fclose(in);
    if (out) fclose(out);
}

#define SYNC(name)                               \
    int name(int fd) {                           \
        REAL(name);                              \
        char path[4096];                         \
        int ours = path_of(fd, path);            \
        if (ours && now(path)) die();                \
        int result = real(fd);                   \
        if (ours && result == 0) copy(path);     \
        return result;                           \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    REAL(unlink);
    char whole[8300], target[8300];
    char here[4096];
    if (path[0] != '/' && getcwd(here, sizeof here)) snprintf(whole, sizeof whole, "%s/%s", here, path);
    else snprintf(whole, sizeof whole, "%s", path);
    if (is_ours(whole)) {
        if (now(whole)) die();
        const char *name = strrchr(whole, '/');
        snprintf(target, sizeof target, "%s%s", synced, name);
        if (synced[0]) real(target);
    }
    return real(path);
}

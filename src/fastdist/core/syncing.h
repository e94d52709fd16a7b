/* The thread behind SyncThread (syncing.pxi): it syncs one file, again and again, and knows nothing of Python.
 *
 * Requests are a position, the latest of which the thread takes when it begins a sync; results are the last position that
 * was synced, and the error of a sync that has failed. Each word is handed over by exchanging it, so that nothing is done
 * twice or lost. After a failure the thread waits until that was read: no later success can come before it. */
#ifndef FASTDIST_SYNCING_H
#define FASTDIST_SYNCING_H

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* What `wanted` and `synced` are when they are not a position. */
enum { FD_NOTHING = -1, FD_END = -2 };

typedef struct {
    int64_t wanted;      /* up to where the next sync is to reach; taken by the thread */
    int64_t synced;      /* up to where the last one has reached; taken by the reader */
    int64_t error;       /* of the sync that has failed; set back by the reader */
    sem_t asked;         /* posted when `wanted` was FD_NOTHING and is no more */
    sem_t heard;         /* posted when the reader has taken an error */
    int event;           /* eventfd: readable when there is a result */
    int fd;
    int (*sync)(int fd); /* 0, or an errno */
    int holders;         /* the thread, and who started it: the last frees all this */
    pthread_t thread;
} fd_syncing;

static int fd_sync_data(int fd) {
    int failed;
    do failed = fdatasync(fd);
    while (failed && errno == EINTR);
    return failed ? errno : 0;
}

static inline int64_t fd_exchange(int64_t *word, int64_t value) {
    return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}

static void fd_syncing_wait(sem_t *semaphore) {
    while (sem_wait(semaphore) && errno == EINTR) continue;
}

static void fd_syncing_signal(fd_syncing *s) {
    uint64_t one = 1;
    while (write(s->event, &one, sizeof one) < 0 && errno == EINTR) continue;
}

static void fd_syncing_release(fd_syncing *s) {
    if (__atomic_sub_fetch(&s->holders, 1, __ATOMIC_ACQ_REL)) return;
    sem_destroy(&s->asked);
    sem_destroy(&s->heard);
    if (s->event >= 0) close(s->event);
    free(s);
}

static void *fd_syncing_run(void *argument) {
    fd_syncing *s = (fd_syncing *)argument;
    for (;;) {
        fd_syncing_wait(&s->asked);
        int64_t position = fd_exchange(&s->wanted, FD_NOTHING);
        if (position == FD_NOTHING) continue; /* it was withdrawn: see fd_syncing_take */
        if (position == FD_END) break;
        int error = s->sync(s->fd);
        if (error) {
            __atomic_store_n(&s->error, error, __ATOMIC_RELEASE);
            fd_syncing_signal(s);
            fd_syncing_wait(&s->heard);
        } else if (fd_exchange(&s->synced, position) == FD_NOTHING) {
            fd_syncing_signal(s); /* else the reader has yet to take what the last signal was for */
        }
    }
    fd_syncing_release(s);
    return NULL;
}

/* Start a thread, with all signals blocked. Return NULL and set errno if that cannot be done. */
static fd_syncing *fd_syncing_start(int fd, int (*sync)(int fd)) {
    fd_syncing *s = (fd_syncing *)calloc(1, sizeof *s);
    sigset_t all, before;
    int failed;
    if (s == NULL) return NULL;
    s->wanted = s->synced = FD_NOTHING;
    s->holders = 2;
    s->fd = fd;
    s->sync = sync != NULL ? sync : fd_sync_data;
    sem_init(&s->asked, 0, 0);
    sem_init(&s->heard, 0, 0);
    s->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->event >= 0) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        failed = pthread_create(&s->thread, NULL, fd_syncing_run, s);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    } else {
        failed = errno;
    }
    if (!failed) return s;
    s->holders = 1;
    fd_syncing_release(s);
    errno = failed;
    return NULL;
}

/* Nothing is woken while a sync runs: the semaphore is up when the thread comes for it. */
static void fd_syncing_request(fd_syncing *s, int64_t position) {
    if (fd_exchange(&s->wanted, position) == FD_NOTHING) sem_post(&s->asked);
}

/* Take the results: return a position or FD_NOTHING, and set `error`. An error comes after the position; what was requested
 * before it was read is withdrawn, and the thread goes on with the next request. */
static int64_t fd_syncing_take(fd_syncing *s, int *error) {
    uint64_t count;
    while (read(s->event, &count, sizeof count) < 0 && errno == EINTR) continue;
    /* The error first: with one all successes there are were before it, for the thread waits. */
    *error = (int)__atomic_load_n(&s->error, __ATOMIC_ACQUIRE);
    int64_t position = fd_exchange(&s->synced, FD_NOTHING);
    if (*error) {
        s->error = 0;
        fd_exchange(&s->wanted, FD_NOTHING);
        sem_post(&s->heard);
    }
    return position;
}

/* Have the thread end after the sync that is running, whatever was requested besides. Wait for that, or leave it alone. */
static void fd_syncing_end(fd_syncing *s, int wait) {
    if (!wait) pthread_detach(s->thread);
    fd_syncing_request(s, FD_END); /* in place of what is requested, before a failure is taken for heard */
    sem_post(&s->heard);
    if (wait) pthread_join(s->thread, NULL);
}

#endif

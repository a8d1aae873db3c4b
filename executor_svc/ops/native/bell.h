/* Waiting for another thread: a bounded time without giving the core away, then asleep. */
#ifndef HEADRACE_BELL_H
#define HEADRACE_BELL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

enum {
    PAUSES_PER_LOOK = 32, /* the clock is read this rarely while spinning */
};

/* What a thread waits for; it looks at nothing but atomics. */
typedef bool (*Condition)(const void *arg);

/* Whoever sleeps looks at its condition once more after it has said that it does. Hence others
 * first make the condition true, then ring. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t signal;
    _Atomic int num_sleeping;
} Bell;

static void bell_init(Bell *bell)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&bell->lock, NULL);
    pthread_cond_init(&bell->signal, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void bell_destroy(Bell *bell)
{
    pthread_cond_destroy(&bell->signal);
    pthread_mutex_destroy(&bell->lock);
}

/* Wake up to `times` threads. */
static void bell_ring(Bell *bell, int times)
{
    if (atomic_load(&bell->num_sleeping) == 0)
        return;
    pthread_mutex_lock(&bell->lock);
    for (int i = 0; i < times; i++)
        pthread_cond_signal(&bell->signal);
    pthread_mutex_unlock(&bell->lock);
}

/* False if the condition is not true at `end_ns`. */
static bool bell_sleep(Bell *bell, Condition condition, const void *arg, int64_t end_ns)
{
    struct timespec end = {end_ns / 1000000000, end_ns % 1000000000};
    int error = 0;
    bool is_true;
    pthread_mutex_lock(&bell->lock);
    atomic_fetch_add(&bell->num_sleeping, 1);
    while (!(is_true = condition(arg)) && error == 0)
        error = pthread_cond_timedwait(&bell->signal, &bell->lock, &end);
    atomic_fetch_sub(&bell->num_sleeping, 1);
    pthread_mutex_unlock(&bell->lock);
    return is_true;
}

static inline void pause_core(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* False if the condition has not become true for so long. */
static bool spin_for(int64_t duration_ns, Condition condition, const void *arg)
{
    int64_t end = now_ns() + duration_ns;
    do {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (condition(arg))
                return true;
            pause_core();
        }
    } while (now_ns() < end);
    return false;
}

#endif

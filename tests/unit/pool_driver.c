/* Drives the thread pool for the sanitizers to watch: many jobs of many sizes, threads that are held
 * up, and where threads are in the end. Exits with 1 and a line on stderr if something is wrong.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

#include "pool.c"

enum { MOST = 400, JOBS = 3000, SLOW_JOBS = 40, HOLD_UP_US = 300 };

static void fail(const char *what, long value)
{
    fprintf(stderr, "%s %ld\n", what, value);
    exit(1);
}

static void count(const void *arg, int64_t first, int64_t last)
{
    int *visits = *(int *const *)arg;
    for (int64_t i = first; i < last; i++)
        visits[i]++;
}

/* Longer than a thread spins: to the others it looks as if it had lost its core. */
static void count_slowly(const void *arg, int64_t first, int64_t last)
{
    if (first % 7 == 0)
        usleep(HOLD_UP_US);
    count(arg, first, last);
}

/* Jobs one right behind the other, cheap and dear by turns: each index is visited once a job. */
static void drive_jobs(int num_threads, int num_jobs, RangeTask task)
{
    int visits[MOST] = {0}, *pointer = visits;
    int64_t expected[MOST] = {0};
    Pool *pool = pool_create(num_threads);
    for (int job = 0; job < num_jobs; job++) {
        int64_t size = job * 7 % MOST;
        pool_run(pool, size, job % 3 ? 5000 : 100000, task, &pointer);
        for (int64_t i = 0; i < size; i++)
            if (visits[i] != ++expected[i])
                fail("a wrong number of visits in job", job);
    }
    pool_destroy(pool);
}

/* Whatever was moved, the caller may run in the end where it could before. */
static void drive_rescues(int num_threads)
{
    Cores before = find_cores();
    drive_jobs(num_threads, SLOW_JOBS, count_slowly);
    Cores after = find_cores();
    if (!CPU_EQUAL(&before.allowed, &after.allowed))
        fail("the caller lost cores with threads", num_threads);
}

/* Every worker has a core of its own, and none the caller's. */
static void check_homes(int num_threads)
{
    Pool *pool = pool_create(num_threads);
    if (pool->cores.count < num_threads)
        pool->cores.count = num_threads;
    for (int i = 0; i < num_threads; i++) /* as on a machine with that many cores */
        CPU_SET(i, &pool->cores.allowed);
    for (int moves = 0; moves < 3; moves++) {
        assign_homes(pool);
        int core = pool->caller_core;
        for (int i = 1; i < num_threads; i++)
            for (int j = 0; j < i; j++) {
                int taken = j == 0 ? core : pool->threads[j].seat.home;
                if (pool->threads[i].seat.home == taken)
                    fail("two threads have core", taken);
            }
        /* As if the caller had been where the next worker is. */
        Seat *seat = &pool->threads[1].seat;
        pool->caller_core = seat->home;
        seat->home = core;
    }
    pool_destroy(pool);
}

/* A tiny step is the caller's alone; a long one, or many short loops, wake workers. */
static void check_wakes(void)
{
    Pool *pool = pool_create(3);
    pool->last_end = now_ns() + 1000000000; /* all of this is one step */
    if (count_useful(pool, WAKE_NS / 2.0) != 0 || count_useful(pool, WAKE_NS / 4.0) != 0)
        fail("workers for little work", 0);
    if (count_useful(pool, WAKE_NS / 4.0) != 2 || count_useful(pool, 0) != 1)
        fail("too few or too many workers", 0);
    pool->last_end = 0; /* a new one */
    if (count_useful(pool, WAKE_NS / 4.0) != 0)
        fail("workers for a new step", 0);
    pool_destroy(pool);
}

int main(void)
{
    int num_cores = find_cores().count;
    int sizes[] = {1, 2, num_cores, 2 * num_cores + 1};
    for (int i = 0; i < 4; i++) {
        drive_jobs(sizes[i], JOBS, count);
        drive_rescues(sizes[i]);
    }
    for (int num_threads = 2; num_threads <= 5; num_threads++)
        check_homes(num_threads);
    check_wakes();
    return 0;
}

/* The thread pool: each thread has a range of a job's chunks; who is done with his own takes half
 * of another's rest (work stealing, Blumofe and Leiserson, 1999).
 *
 *   caller   | ranges [0, 20) [20, 40) | c0 | c1 | ... | c19 | steals c38, c39 | waits for the rest
 *   worker   |     spins, then sleeps       | c20 | c21 | ... | c37            | spins, sleeps
 *
 * Neighbouring chunks to one thread, so that its weights are one stream of memory: chunks that went
 * to whoever came read at 75 % of the bandwidth. Small chunks, so that a thread that loses its core
 * delays the one that it holds: an OpenMP static schedule was 12 times slower beside one busy
 * process. For that one chunk see rescue().
 *
 * A worker that wakes late finds only empty ranges, and nobody waits for workers that never came.
 */
#include "pool.h"

#include <stdlib.h>
#include <string.h>

#include "bell.h"
#include "cores.h"
#include "ranges.h"

enum {
    CHUNK_NS = 10000,       /* long against taking it (0.1 us), short against a preemption */
    SPIN_NS = 50000,        /* the gap between two loops of a step is shorter */
    WAKE_NS = 1000000,      /* waking takes 50 us, and the core of another stage's process */
    SHARE_NS = 100000,      /* of a loop, for each thread that is woken */
    CACHE_LINE = 64,
};

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint64_t range;
    _Atomic bool holds_chunks; /* it may have taken some that are not done */
    Seat seat;                 /* the caller's has no home */
    Pool *pool;
    int index;
} Thread;

struct Pool {
    _Alignas(CACHE_LINE) _Atomic uint64_t generation; /* a new one says that there is a new job */
    _Atomic bool stop;
    /* The job. Written before its ranges are, valid for whoever has taken from one of them. */
    _Atomic(RangeTask) task;
    _Atomic(const void *) arg;
    _Atomic int64_t count, chunk_size, chunk_ns;
    /* Chunks that are not done, as far as threads have told: each tells when its range is empty. */
    _Alignas(CACHE_LINE) _Atomic int64_t num_left;
    _Alignas(CACHE_LINE) Bell work, finished;
    /* The caller's own: the work of this step so far, when its last loop ended, and where. */
    double step_ns;
    int64_t last_end;
    int caller_core;
    Cores cores;
    int num_threads;
    Thread threads[]; /* the first is the caller */
};

/* Run the next chunk of one's own range. False if none is left. */
static bool run_chunk(Pool *pool, Thread *own)
{
    int64_t chunk;
    if (!take_first(&own->range, &chunk))
        return false;
    int64_t count = atomic_load(&pool->count), size = atomic_load(&pool->chunk_size);
    int64_t first = chunk * size, last = first + size;
    RangeTask task = atomic_load(&pool->task);
    task(atomic_load(&pool->arg), first, last < count ? last : count);
    return true;
}

/* Get something into one's own range, which has become empty. False if nobody has more. */
static bool refill(Pool *pool, Thread *own)
{
    Range range = unpack_range(atomic_load(&own->range));
    if (range.next < range.end) /* the next job has begun */
        return true;
    for (int i = 1; i < pool->num_threads; i++) {
        Thread *other = &pool->threads[(own->index + i) % pool->num_threads];
        if (take_rear(&other->range, range.generation, &own->range))
            return true;
    }
    return false;
}

static void tell_done(Pool *pool, int64_t num_done)
{
    if (num_done > 0 && atomic_fetch_sub(&pool->num_left, num_done) == num_done)
        bell_ring(&pool->finished, 1);
}

/* Work until nothing of the job is left to take. */
static void take_part(Pool *pool, Thread *own)
{
    atomic_store(&own->holds_chunks, true);
    do {
        int64_t num_done = 0;
        while (run_chunk(pool, own))
            num_done++;
        tell_done(pool, num_done);
    } while (refill(pool, own));
    atomic_store(&own->holds_chunks, false);
}

/* What threads wait for: the next job after that of a generation, or the current one's end. */
typedef struct {
    const Pool *pool;
    uint64_t generation;
} Wait;

static bool has_successor(const void *arg)
{
    const Wait *wait = arg;
    const Pool *pool = wait->pool;
    return atomic_load(&pool->generation) != wait->generation || atomic_load(&pool->stop);
}

static bool is_done(const void *arg)
{
    const Wait *wait = arg;
    return atomic_load(&wait->pool->num_left) == 0;
}

/* A thread that holds chunks for so long waits for its core, for milliseconds if another process
 * has it. Bring it over to this core, which is about to be free: this thread sleeps next. It goes
 * home when its chunks are done. */
static void rescue(Pool *pool, const Thread *own)
{
    int core = pool->cores.count > 0 ? sched_getcpu() : NO_CORE; /* never where none leads back */
    for (int i = 0; i < pool->num_threads; i++) {
        Thread *thread = &pool->threads[i];
        if (core >= 0 && thread != own && atomic_load(&thread->holds_chunks)) {
            atomic_store(&thread->seat.is_away, true);
            move_to_core(&thread->seat, core);
        }
    }
}

/* Spin, then sleep; in between look after those that the job still waits for. */
static void wait_until(Pool *pool, const Thread *own, Bell *bell, Condition condition,
                       const Wait *wait)
{
    if (spin_for(SPIN_NS, condition, wait))
        return;
    if (!is_done(wait)) {
        int64_t patience_ns = 2 * atomic_load(&pool->chunk_ns);
        if (patience_ns > SPIN_NS && bell_sleep(bell, condition, wait, now_ns() + patience_ns))
            return;
        rescue(pool, own);
    }
    bell_sleep(bell, condition, wait, INT64_MAX);
}

static void leave_rescue(Pool *pool, Thread *own)
{
    if (atomic_exchange(&own->seat.is_away, false))
        go_home(&own->seat, &pool->cores);
}

static void *work(void *arg)
{
    Thread *own = arg;
    Pool *pool = own->pool;
    while (!atomic_load(&pool->stop)) {
        Wait wait = {pool, atomic_load(&pool->generation)};
        take_part(pool, own);
        leave_rescue(pool, own);
        wait_until(pool, own, &pool->work, has_successor, &wait);
    }
    return NULL;
}

/* Give each worker a core for itself, none of them the caller's, which runs where the kernel likes.
 * If that has changed, the worker whose home it was gets the one that the caller left. */
static void assign_homes(Pool *pool)
{
    int core = sched_getcpu(), left = pool->caller_core, next = core;
    if (core == left || core < 0)
        return;
    pool->caller_core = core;
    for (int i = 1; i < pool->num_threads; i++) {
        Seat *seat = &pool->threads[i].seat;
        if (left == NO_CORE)
            atomic_store(&seat->home, next = next_core(&pool->cores, next, core));
        else if (atomic_load(&seat->home) == core)
            atomic_store(&seat->home, left);
        else
            continue;
        go_home(seat, &pool->cores);
    }
}

/* Stop and join the first `num_threads` threads, the caller left out. */
static void end_workers(Pool *pool, int num_threads)
{
    atomic_store(&pool->stop, true);
    bell_ring(&pool->work, num_threads);
    for (int i = 1; i < num_threads; i++)
        pthread_join(pool->threads[i].seat.thread, NULL);
    bell_destroy(&pool->finished);
    bell_destroy(&pool->work);
}

Pool *pool_create(int num_threads)
{
    int most = num_threads > 1 ? num_threads : 1;
    size_t size = sizeof(Pool) + most * sizeof(Thread);
    Pool *pool = aligned_alloc(CACHE_LINE, size);
    if (pool == NULL)
        return NULL;
    memset(pool, 0, size);
    bell_init(&pool->work);
    bell_init(&pool->finished);
    pool->cores = find_cores();
    pool->caller_core = NO_CORE;
    for (int i = 0; i < most; i++) {
        pool->threads[i].pool = pool;
        pool->threads[i].index = i;
        pool->threads[i].seat.home = NO_CORE;
    }
    /* Workers go by num_threads: it stands before the first of them starts. */
    pool->num_threads = most;
    for (int i = 1; i < most; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, &pool->threads[i]) != 0) {
            end_workers(pool, i);
            free(pool);
            return NULL;
        }
        atomic_store(&pool->threads[i].seat.thread, thread);
    }
    return pool;
}

void pool_destroy(Pool *pool)
{
    end_workers(pool, pool->num_threads);
    leave_rescue(pool, &pool->threads[0]);
    free(pool);
}

int pool_threads(const Pool *pool) { return pool->num_threads; }

/* How many workers this loop pays for, awake or not. None before the step has shown enough work: in
 * one of a tiny model the caller is faster alone. */
static int count_useful(Pool *pool, double loop_ns)
{
    if (now_ns() - pool->last_end > SPIN_NS)
        pool->step_ns = 0;
    pool->step_ns += loop_ns;
    double num_shares = 1 + loop_ns / SHARE_NS, num_workers = pool->num_threads - 1;
    if (pool->step_ns < WAKE_NS)
        return 0;
    return (int)(num_shares < num_workers ? num_shares : num_workers);
}

/* A job of chunks of `size` indices; neighbouring ones to each thread. */
static void publish(Pool *pool, int64_t count, int64_t size, RangeTask task, const void *arg)
{
    int64_t num_chunks = (count + size - 1) / size, num_threads = pool->num_threads;
    uint64_t generation = (atomic_load(&pool->generation) + 1) % NUM_GENERATIONS;
    atomic_store(&pool->task, task);
    atomic_store(&pool->arg, arg);
    atomic_store(&pool->count, count);
    atomic_store(&pool->chunk_size, size);
    atomic_store(&pool->num_left, num_chunks);
    for (int64_t i = 0; i < num_threads; i++) {
        int64_t next = num_chunks * i / num_threads, end = num_chunks * (i + 1) / num_threads;
        atomic_store(&pool->threads[i].range, pack_range((Range){generation, next, end}));
    }
    atomic_store(&pool->generation, generation);
}

static void run_together(Pool *pool, int64_t count, double cost_ns, int64_t size, RangeTask task,
                         const void *arg)
{
    Thread *caller = &pool->threads[0];
    int num_useful = count_useful(pool, count * cost_ns);
    if (num_useful == 0 && atomic_load(&pool->work.num_sleeping) == pool->num_threads - 1) {
        task(arg, 0, count);
    } else {
        atomic_store(&caller->seat.thread, pthread_self());
        if (pool->num_threads == pool->cores.count)
            assign_homes(pool);
        atomic_store(&pool->chunk_ns, (int64_t)(size * cost_ns));
        publish(pool, count, size, task, arg);
        bell_ring(&pool->work, num_useful);
        take_part(pool, caller);
        wait_until(pool, caller, &pool->finished, is_done, &(Wait){.pool = pool});
        leave_rescue(pool, caller);
    }
    pool->last_end = now_ns();
}

void pool_run(Pool *pool, int64_t count, double cost_ns, RangeTask task, const void *arg)
{
    int64_t size = cost_ns < CHUNK_NS ? (int64_t)(CHUNK_NS / (cost_ns + 0.01)) : 1;
    if (size < count / MAX_CHUNKS + 1)
        size = count / MAX_CHUNKS + 1;
    if (count > size && pool->num_threads > 1)
        run_together(pool, count, cost_ns, size, task, arg);
    else if (count > 0)
        task(arg, 0, count);
}

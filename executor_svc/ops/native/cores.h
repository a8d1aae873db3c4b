/* On which core a thread runs. All of it is a wish: where the kernel refuses, it stays. */
#ifndef HEADRACE_CORES_H
#define HEADRACE_CORES_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { NO_CORE = -1 };

typedef struct {
    cpu_set_t allowed;
    int count;
} Cores;

/* A thread's place. Whoever moves it says so first, so that it finds its way back. */
typedef struct {
    _Atomic(pthread_t) thread;
    _Atomic int home; /* its own core, or NO_CORE: any that is allowed */
    _Atomic bool is_away;
} Seat;

static Cores find_cores(void)
{
    Cores cores;
    CPU_ZERO(&cores.allowed);
    if (sched_getaffinity(0, sizeof cores.allowed, &cores.allowed) != 0)
        CPU_ZERO(&cores.allowed); /* more cores than a cpu_set_t counts: nobody gets a home */
    cores.count = CPU_COUNT(&cores.allowed);
    return cores;
}

/* The first core behind `core` that is allowed and not `taken`; there must be one. */
static int next_core(const Cores *cores, int core, int taken)
{
    do
        core = (core + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(core, &cores->allowed) || core == taken);
    return core;
}

/* A waiting thread goes at once; one that runs elsewhere is stopped for it. */
static void move_to_core(Seat *seat, int core)
{
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    pthread_setaffinity_np(seat->thread, sizeof only, &only);
}

static void go_home(Seat *seat, const Cores *cores)
{
    int home;
    do { /* another one may be assigned meanwhile */
        home = atomic_load(&seat->home);
        if (home == NO_CORE)
            pthread_setaffinity_np(seat->thread, sizeof cores->allowed, &cores->allowed);
        else
            move_to_core(seat, home);
    } while (home != atomic_load(&seat->home));
}

#endif

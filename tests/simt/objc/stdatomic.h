// As much of C's atomics as ggml-metal uses, see Metal/Metal.h: GCC's own are not for clang.

#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef bool      atomic_bool;
typedef int       atomic_int;
typedef uintptr_t atomic_uintptr_t;

#define memory_order_relaxed 0
#define memory_order_acquire 2
#define memory_order_release 3

#define atomic_load(p)                         (*(p))
#define atomic_load_explicit(p, order)         (*(p))
#define atomic_store(p, x)                     (*(p) = (x))
#define atomic_store_explicit(p, x, order)     (*(p) = (x))
#define atomic_fetch_add(p, x)                 ((*(p) += (x)) - (x))
#define atomic_fetch_sub(p, x)                 ((*(p) -= (x)) + (x))
#define atomic_fetch_add_explicit(p, x, order) atomic_fetch_add(p, x)
#define atomic_fetch_sub_explicit(p, x, order) atomic_fetch_sub(p, x)

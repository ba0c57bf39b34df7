// As much of libdispatch as ggml-metal calls, see Metal/Metal.h.

#pragma once

#define DISPATCH_TIME_FOREVER (~0ull)

#define QOS_CLASS_DEFAULT        0x15
#define QOS_CLASS_USER_INITIATED 0x19

typedef id dispatch_group_t;
typedef id dispatch_queue_t;
typedef id dispatch_semaphore_t;

dispatch_group_t     dispatch_group_create(void);
dispatch_queue_t     dispatch_get_global_queue(long identifier, unsigned long flags);
dispatch_semaphore_t dispatch_semaphore_create(long value);

void dispatch_async(dispatch_queue_t queue, void (^ block)(void));
void dispatch_group_async(dispatch_group_t group, dispatch_queue_t queue, void (^ block)(void));
void dispatch_release(id object);
long dispatch_group_wait(dispatch_group_t group, unsigned long long timeout);
long dispatch_semaphore_signal(dispatch_semaphore_t semaphore);
long dispatch_semaphore_wait(dispatch_semaphore_t semaphore, unsigned long long timeout);

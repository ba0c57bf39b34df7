// The entry points of the kernels in Metal. ggml-metal gets them in one file with all that they include (flatten.cmake).

#include "fasa-words.h"

#include "../gpu/fasa-store.h"
#include "../gpu/fasa-choose.h"
#include "../gpu/fasa-attend.h"

// what every kernel is told last
#define FASA_PLACE                                          \
        threadgroup char * shared FASA_SHARED_ARGUMENT,      \
        uint3  group [[threadgroup_position_in_grid]],      \
        ushort index [[thread_index_in_threadgroup]],       \
        ushort lane  [[thread_index_in_simdgroup]],         \
        ushort warp  [[simdgroup_index_in_threadgroup]]

#define FASA_HERE { (int32_t) index, (int32_t) lane, (int32_t) warp, (int32_t) group.x, (int32_t) group.y }

[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_store(
        constant fasa_store_args & args [[buffer(0)]],
        device       char    * tips     [[buffer(1)]],
        device const char    * k        [[buffer(2)]],
        device const int32_t * dims     [[buffer(3)]],
        device const float   * ranges   [[buffer(4)]],
        device const int64_t * idxs     [[buffer(5)]],
        FASA_PLACE) {
    (void) shared;
    const fasa_at at = FASA_HERE;
    const fasa_store_args own = args;
    fasa_store_end(own, fasa_store_begin(own, dims, ranges, idxs, at), tips, k, at);
}

[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_stats(
        constant fasa_select_args & args [[buffer(0)]],
        device const char    * q         [[buffer(1)]],
        device const char    * tips      [[buffer(2)]],
        device const int32_t * dims      [[buffer(3)]],
        device const float   * ranges    [[buffer(4)]],
        device const char    * mask      [[buffer(5)]],
        device       char    * memory    [[buffer(6)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_select_args own = args;
    fasa_select_stats(own, q, tips, dims, ranges, mask, memory, shared, at);
}

[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_keys(
        constant fasa_select_args & args [[buffer(0)]],
        device const char    * q         [[buffer(1)]],
        device const char    * tips      [[buffer(2)]],
        device const int32_t * dims      [[buffer(3)]],
        device const float   * ranges    [[buffer(4)]],
        device const char    * mask      [[buffer(5)]],
        device       char    * memory    [[buffer(6)]],
        device const int32_t * forced    [[buffer(7)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_select_args own = args;
    fasa_select_keys(own, q, tips, dims, ranges, mask, forced, memory, shared, at);
}

[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_mark(
        constant fasa_select_args & args [[buffer(0)]],
        device char * memory             [[buffer(1)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_select_args own = args;
    fasa_select_mark(own, memory, (threadgroup uint32_t *) shared, at);
}

// no order of memory between the threadgroups of a dispatch: a dispatch of its own, one threadgroup for each row
[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_list(
        constant fasa_select_args & args [[buffer(0)]],
        device char    * memory          [[buffer(1)]],
        device int32_t * ids             [[buffer(2)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_select_args own = args;

    threadgroup uint32_t * words = (threadgroup uint32_t *) shared;

    const fasa_threshold threshold = fasa_find_threshold(own, fasa_divide(own, memory).state[at.y], words, at);
    fasa_sync_block();
    fasa_select_list(own, threshold, memory, ids, words, at);
}

template <int LANES, int N>
[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_split(
        constant fasa_attend_args & args [[buffer(0)]],
        device const char    * q         [[buffer(1)]],
        device const char    * k         [[buffer(2)]],
        device const char    * v         [[buffer(3)]],
        device const int32_t * idx       [[buffer(4)]],
        device const char    * mask      [[buffer(5)]],
        device       float   * partial   [[buffer(6)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_attend_args own = args;
    fasa_attend_split<LANES, N>(own, q, k, v, idx, mask, partial, shared, at);
}

typedef decltype(kernel_fasa_split<8, 1>) kernel_fasa_split_t;

template [[host_name("kernel_fasa_split_8_1")]]  kernel kernel_fasa_split_t kernel_fasa_split< 8, 1>;
template [[host_name("kernel_fasa_split_8_4")]]  kernel kernel_fasa_split_t kernel_fasa_split< 8, 4>;
template [[host_name("kernel_fasa_split_16_1")]] kernel kernel_fasa_split_t kernel_fasa_split<16, 1>;
template [[host_name("kernel_fasa_split_16_4")]] kernel kernel_fasa_split_t kernel_fasa_split<16, 4>;
template [[host_name("kernel_fasa_split_32_1")]] kernel kernel_fasa_split_t kernel_fasa_split<32, 1>;
template [[host_name("kernel_fasa_split_32_4")]] kernel kernel_fasa_split_t kernel_fasa_split<32, 4>;

[[max_total_threads_per_threadgroup(FASA_THREADS)]]
kernel void kernel_fasa_combine(
        constant fasa_attend_args & args [[buffer(0)]],
        device const float * partial     [[buffer(1)]],
        device const float * sinks       [[buffer(2)]],
        device       float * out         [[buffer(3)]],
        FASA_PLACE) {
    const fasa_at at = FASA_HERE;
    const fasa_attend_args own = args;
    fasa_attend_combine(own, partial, sinks, out, (threadgroup float *) shared, at);
}

// CUDA C++ as g++ may compile it: the words and built-ins that the templates use, each thread a fibre (emulator.cpp).
// Threads change only where they wait for each other, in an order that a seed decides; lanes don't run in step.
#pragma once
#include <math.h>

struct dim3 {
    unsigned x, y, z;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Of one section, which a block that waits for others takes along.
#define __shared__ static __attribute__((section("cuda_shared")))

enum Collective { SYNCTHREADS, SYNCWARP, SHFL, SHFL_XOR, SHFL_UP, BALLOT, REDUCE_MAX, REDUCE_MIN, REDUCE_ADD, SLEEP };
// Waits for whoever takes part; returns what this thread gets of all values. Lanes must agree on all but the value.
unsigned collective(Collective kind, unsigned mask, unsigned value, unsigned parameter);

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline void __syncthreads() { collective(SYNCTHREADS, 0, 0, 0); }
inline void __syncwarp(unsigned mask = ~0u) { collective(SYNCWARP, mask, 0, 0); }
inline void __nanosleep(unsigned) { collective(SLEEP, 0, 0, 0); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned mask, bool is) { return collective(BALLOT, mask, is, 0); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) { return collective(REDUCE_MAX, mask, x, 0); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) { return collective(REDUCE_MIN, mask, x, 0); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) { return collective(REDUCE_ADD, mask, x, 0); }
inline int __shfl_sync(unsigned mask, int x, int from) { return (int)collective(SHFL, mask, (unsigned)x, from); }
inline int __shfl_up_sync(unsigned mask, int x, unsigned by) { return (int)collective(SHFL_UP, mask, (unsigned)x, by); }
inline float __shfl_xor_sync(unsigned mask, float x, unsigned by) {
    return __uint_as_float(collective(SHFL_XOR, mask, __float_as_uint(x), by));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// cvt.rn.satfinite.e4m3: NaN stays, what is too large becomes 448. A value is counted in units of the last bit
// that e4m3 keeps, 2^(exponent - 3); beside 2^(exponent + 20) a float keeps that bit too, and rounds to it.
inline unsigned e4m3(float x) {
    if (x != x) return 0x7f;
    const float size = fminf(fabsf(x), 448.0f);
    const unsigned exponent = __float_as_uint(fmaxf(size, 0x1p-6f)) >> 23;  // with a bias of 127
    const unsigned units = __float_as_uint(__uint_as_float((exponent + 20) << 23) + size) & 0x7fffff;
    return (__float_as_uint(x) >> 24 & 0x80) | (((exponent - 121) << 3) + units);
}
inline unsigned short cvt_e4m3x2(float high, float low) { return (unsigned short)(e4m3(high) << 8 | e4m3(low)); }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T atomicAdd(T* at, T x) {
    T old = *at;
    *at = old + x;
    return old;
}
template <class T> T atomicOr(T* at, T x) {
    T old = *at;
    *at = old | x;
    return old;
}
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// Runs a grid of f's threads; what went wrong, or null.
const char* run(void (*f)(void*), void* arguments, dim3 grid, unsigned threads, unsigned seed, bool cooperative);

template <unsigned... I> struct Numbers {};
template <unsigned N, unsigned... I> struct Count : Count<N - 1, N - 1, I...> {};
template <unsigned... I> struct Count<0, I...> { using Type = Numbers<I...>; };
// A kernel with its arguments: pointers to each, as a launch passes them.
template <class... A> struct Kernel {
    void (*function)(A...);
    void** arguments;
    template <unsigned... I> void call(Numbers<I...>) { function(*(A*)arguments[I]...); }
    static void thread(void* self) { ((Kernel*)self)->call(typename Count<sizeof...(A)>::Type()); }
};
template <class... A>
const char* launch(void (*function)(A...), void** arguments, dim3 grid, unsigned threads, unsigned seed, bool cooperative) {
    Kernel<A...> kernel = {function, arguments};
    return run(Kernel<A...>::thread, &kernel, grid, threads, seed, cooperative);
}

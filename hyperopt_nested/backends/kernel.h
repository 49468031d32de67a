// What is the same in all kernels. ROUNDS says whether anything is rounded to bfloat16.
#include <cmath>
#include <cstdint>

static inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static inline float load(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
static inline float load(float x) { return ROUNDS && x != x ? NAN : x; }
static inline double load(double x) { return ROUNDS && x != x ? NAN : x; }
template <typename T> static inline T load(T x) { return x; }

// in the place of std::vector, which takes a third of the time that a kernel takes to compile
template <typename T> struct Array {
  T* data = nullptr;
  int64_t size = 0, room = 0;
  ~Array() { delete[] data; }
  T& operator[](int64_t i) { return data[i]; }
  void add(const T& x) { resize(size + 1), data[size - 1] = x; }
  void resize(int64_t count) {
    if (count > room) {
      T* const bigger = new T[room = larger(count, 2 * room)]();
      for (int64_t i = 0; i < size; i++) bigger[i] = data[i];
      delete[] data;
      data = bigger;
    }
    size = count;
  }
};

// bfloat16, which a NaN stays through if it is read from that, or by `load`: no carry gets as far as its sign then
static inline float round16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return __builtin_bit_cast(float, (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}
static inline uint16_t upper(float x) { return __builtin_bit_cast(uint32_t, x) >> 16; }  // of what is rounded already

static inline int64_t modulo(int64_t x, int64_t y) { return y ? ((x % y) + y) % y : 0; }
static inline float modulo(float x, float y) { const float m = std::fmod(x, y); return m != 0 && (m < 0) != (y < 0) ? m + y : m; }
static inline double modulo(double x, double y) { const double m = std::fmod(x, y); return m != 0 && (m < 0) != (y < 0) ? m + y : m; }

// two neighbours at once: each is where vectors of floats have it after one operation, where widening takes several
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;
static inline float load_first(Pair x) { return __builtin_bit_cast(float, x << 16); }
static inline float load_second(Pair x) { return __builtin_bit_cast(float, x & 0xffff0000u); }
static inline Pair pair(float first, float second) {
  return __builtin_bit_cast(uint32_t, first) >> 16 | __builtin_bit_cast(uint32_t, second);
}

// what does not change in a loop chooses by bits: of a condition, the compiler makes a branch, and no vectors
template <typename T, typename Bits> static inline T chosen(bool c, T x, T y) {
  const Bits mask = -Bits(c);
  return __builtin_bit_cast(T, (__builtin_bit_cast(Bits, x) & mask) | (__builtin_bit_cast(Bits, y) & ~mask));
}
static inline float choose(bool c, float x, float y) { return chosen<float, uint32_t>(c, x, y); }
static inline double choose(bool c, double x, double y) { return chosen<double, uint64_t>(c, x, y); }

// a copy, past the cache if that can not hold it anyway: else what is written would be read first
template <typename T> static inline void put(T* to, const T* from, int64_t count, bool past) {
#if defined(__AVX__) && defined(__GNUC__) && !defined(__clang__)
  if (past) {
    typedef long long Half __attribute__((vector_size(32), may_alias));
    typedef long long Loose __attribute__((vector_size(32), may_alias, aligned(1)));
    int64_t j = 0;
    for (; j < count && (uintptr_t(to + j) & 63); j++) to[j] = from[j];
    for (constexpr int64_t line = 64 / sizeof(T); j + line <= count; j += line)
      for (int64_t half = 0; half < line; half += line / 2)
        __builtin_ia32_movntdq256((Half*)(to + j + half), *(const Loose*)(from + j + half));
    for (; j < count; j++) to[j] = from[j];
    return;
  }
#endif
  __builtin_memcpy(to, from, count * sizeof(T));
}

// asks memory for what is needed soon, in whole lines: hardware does so too, but not from page to page, nor while a row's later loops run
template <int64_t WHOLE, typename T> static inline void fetch(const T* at, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  if (count == WHOLE) {
    #pragma GCC unroll 64
    for (int64_t i = 0; i < WHOLE; i += line) __builtin_prefetch(at + i, 0, 1);
  } else {
    for (; count >= line; at += line, count -= line) __builtin_prefetch(at, 0, 1);
  }
}

constexpr int64_t CHUNK = 128;  // steps of a loop, for which it fetches at once
constexpr int64_t CACHE = 1 << 25;  // bytes
constexpr int64_t BLOCK = 8192;  // elements; rows are not split

// The packed matmul for x86 CPUs: y = scale_x * scale_w * (codes_x - zero_point) @ codes_w^T + bias.
//
// Weights are read as they are stored and expanded 16 or 32 outputs at a time into a buffer that stays in the cache, so
// that nothing is kept beside the packed bytes.
//
// With VNNI, products of unsigned codes of x with signed codes of w are summed in 32 bits (vpdpbusd). With AVX2 alone
// they are summed in 16 bits (vpmaddubsw). A pair of products is at most 2 * 255 * 8 = 4,080, so 8 pairs fit
// (32,640 < 32,767); then they are widened to 32 bits. Codes of more than 4 bits are there two digits,
// w = 16 * high + low with both in -8..8.
//
// Floats are rounded in the order of the reference and without fused multiply-add (-ffp-contract=off), so that y
// equals the reference's to the bit where its fp32 sums are exact.

#include <immintrin.h>

typedef __m256 eight;
enum { CODE_OF_ZERO = 0 };

#include "packed_linear.h"

enum { AVX2, AVX_VNNI, AVX512_VNNI };  // what multiplies
enum { ROWS = 6, WIDE_ROWS = 12 };     // a tile of y: 6 tokens and a panel, with AVX-512 12 and two

static inline __m256 load8(const void *x, int64_t i, int dtype) {
  if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)x + i);
  __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
  if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline void store8(void *y, int64_t i, int dtype, __m256 v) {
  if (dtype == FLOAT32) {
    _mm256_storeu_ps((float *)y + i, v);
    return;
  }
  __m128i half;
  if (dtype == FLOAT16) {
    half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {  // to the nearest, ties to even; a NaN stays one
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7FC00000), nan);
    bits = _mm256_srli_epi32(bits, 16);
    half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  }
  _mm_storeu_si128((__m128i *)((uint16_t *)y + i), half);
}

static float largest(const void *x, int64_t n, int dtype) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    __m256 v = load_some(x, i, n - i, dtype);
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  if (_mm256_movemask_ps(nan)) return __builtin_nanf("");
  float values[8], found = 0;
  _mm256_storeu_ps(values, most);
  for (int j = 0; j < 8; j++) found = values[j] > found ? values[j] : found;
  return found;
}

static int quantize(const void *x, int64_t n, int interleaved, int dtype, float scale, int zero_point, uint8_t *codes) {
  const __m256 s = _mm256_set1_ps(scale);
  __m256 nan = _mm256_setzero_ps();
  const __m128i order = _mm_loadu_si128((const __m128i *)INTERLEAVED);
  const __m256 lowest = _mm256_set1_ps(-zero_point), highest = _mm256_set1_ps(255 - zero_point);
  for (int64_t i = 0; i < n; i += 8) {
    __m256 steps = _mm256_div_ps(load_some(x, i, n - i, dtype), s);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(steps, steps, _CMP_UNORD_Q));
    __m256i v = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(steps, lowest), highest));
    v = _mm256_add_epi32(v, _mm256_set1_epi32(zero_point));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i packed = _mm_packus_epi16(words, words);
    if (interleaved) packed = _mm_shuffle_epi8(packed, order);
    int64_t bytes = _mm_cvtsi128_si64(packed);
    if (n - i < 8 && !interleaved)
      memcpy(codes + i, &bytes, n - i);
    else
      memcpy(codes + i, &bytes, 8);  // a store, where a length that is not known is a call
  }
  return _mm256_movemask_ps(nan) != 0;
}

// 16 bytes of each of up to 8 rows as 4 vectors of 4 bytes a row. Rows of bytes (`wide`) are interleaved as x is.
static inline void transpose(const uint8_t *row, int64_t stride, int64_t rows, int64_t from, int64_t size, int wide,
                             int odd, __m256i *found) {
  const __m128i order = _mm_loadu_si128((const __m128i *)INTERLEAVED);
  __m128i r[8];
  for (int j = 0; j < 8; j++) {
    uint8_t buffer[16];
    r[j] = _mm_loadu_si128((const __m128i *)sixteen(row + j * stride, from, j < rows ? size : 0, odd, buffer));
    if (wide) r[j] = _mm_shuffle_epi8(r[j], order);
  }
  __m256i a[4], b[4];
  for (int j = 0; j < 4; j++) a[j] = _mm256_set_m128i(r[j + 4], r[j]);
  for (int j = 0; j < 4; j += 2) {
    b[j] = _mm256_unpacklo_epi32(a[j], a[j + 1]);
    b[j + 1] = _mm256_unpackhi_epi32(a[j], a[j + 1]);
  }
  for (int j = 0; j < 2; j++) {
    found[2 * j] = _mm256_unpacklo_epi64(b[j], b[j + 2]);
    found[2 * j + 1] = _mm256_unpackhi_epi64(b[j], b[j + 2]);
  }
}

// Digits of signed codes: w = 16 * high + low, both in -8..8
static inline void split(__m256i codes, __m256i *low, __m256i *high) {
  const __m256i eight = _mm256_set1_epi8(8), nibble = _mm256_set1_epi8(15);
  *low = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(codes, nibble), eight), eight);
  __m256i rest = _mm256_sub_epi8(codes, *low);  // 16 * high; 128 is -128 in 8 bits
  __m256i digit = _mm256_and_si256(_mm256_srli_epi16(rest, 4), nibble);
  digit = _mm256_sub_epi8(_mm256_xor_si256(digit, eight), eight);
  __m256i over = _mm256_and_si256(_mm256_cmpeq_epi8(digit, _mm256_set1_epi8(-8)),
                                  _mm256_cmpgt_epi8(codes, _mm256_setzero_si256()));
  *high = _mm256_blendv_epi8(digit, eight, over);
}

static void expand_panel(const uint8_t *weight, int64_t stride, int64_t outputs, int64_t n, int wide, int8_t *low,
                         int8_t *high, int32_t *sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i code = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)CODES));
  for (int part = 0; part < 2; part++) {
    const uint8_t *row = weight + 8 * part * stride;
    const int64_t rows = outputs - 8 * part;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += STEP) {
      __m256i codes[8], pairs = _mm256_setzero_si256();
      if (wide) {
        transpose(row, stride, rows, i, n, 1, 0, codes);
        transpose(row, stride, rows, i + 16, n, 1, 0, codes + 4);
      } else {
        __m256i bytes[4];
        transpose(row, stride, rows, i / 2, (n + 1) / 2, 0, n % 2, bytes);
        for (int j = 0; j < 4; j++) {
          codes[2 * j] = _mm256_shuffle_epi8(code, _mm256_and_si256(bytes[j], nibble));
          codes[2 * j + 1] = _mm256_shuffle_epi8(code, _mm256_and_si256(_mm256_srli_epi16(bytes[j], 4), nibble));
        }
      }
      for (int j = 0; j < 8; j++) {
        const int64_t at = i * PANEL + 64 * j + 32 * part;
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes[j]));
        if (high) split(codes[j], codes + j, (__m256i *)(high + at));
        _mm256_store_si256((__m256i *)(low + at), codes[j]);
      }
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    _mm256_storeu_si256((__m256i *)sums + part, sum);
  }
}

// Adds the products of four codes of a token with those of 16 outputs. In assembly, for compilers hold fewer than the
// 12 sums of a tile in registers.
static inline void add_products(__m256i *s, const uint8_t *token, __m256i b0, __m256i b1) {
  __m256i x, product;
  __asm__("vpbroadcastd %4, %0\n\t"
          "vpmaddubsw %5, %0, %1\n\t"
          "vpaddw %1, %2, %2\n\t"
          "vpmaddubsw %6, %0, %0\n\t"
          "vpaddw %0, %3, %3"
          : "=&x"(x), "=&x"(product), "+x"(s[0]), "+x"(s[1])
          : "m"(*(const int32_t *)token), "x"(b0), "x"(b1));
}

// int32 sums of 6 tokens' codes, `stride` apart, with a panel of 16 outputs
static __attribute__((noinline)) void tile(const uint8_t *a, int64_t stride, const int8_t *b, int64_t padded,
                                           __m256i *sums) {
  for (int64_t k = 0; k < padded; k += STEP) {
    __m256i s[2 * ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < 2 * ROWS; i++) s[i] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < STEP; i += 4, a += 4, b += 64) {
      __m256i b0 = _mm256_load_si256((const __m256i *)b), b1 = _mm256_load_si256((const __m256i *)b + 1);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) add_products(s + 2 * r, a + r * stride, b0, b1);
    }
#pragma GCC unroll 12
    for (int i = 0; i < 2 * ROWS; i++) {
      __m256i widened = _mm256_madd_epi16(s[i], _mm256_set1_epi16(1));
      sums[i] = k ? _mm256_add_epi32(sums[i], widened) : widened;
    }
  }
}

// The same with VNNI, for up to 6 tokens
#define VNNI __attribute__((target("avx2,avxvnni")))
VNNI static inline __attribute__((always_inline)) void tile_vnni_of(const uint8_t *a, int64_t stride, const int8_t *b,
                                                                    int64_t padded, const int rows, __m256i *sums) {
  __m256i s[2 * ROWS];
#pragma GCC unroll 12
  for (int i = 0; i < 2 * rows; i++) s[i] = _mm256_setzero_si256();
  for (int64_t k = 0; k < padded; k += 4, a += 4, b += 64) {
    __m256i b0 = _mm256_load_si256((const __m256i *)b), b1 = _mm256_load_si256((const __m256i *)b + 1);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      __m256i x = _mm256_set1_epi32(*(const int32_t *)(a + r * stride));
      s[2 * r] = _mm256_dpbusd_avx_epi32(s[2 * r], x, b0);
      s[2 * r + 1] = _mm256_dpbusd_avx_epi32(s[2 * r + 1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < 2 * rows; i++) sums[i] = s[i];
}

// a number of tokens that the compiler knows
#define CASE(tile, n)                    \
  case n:                                \
    tile(a, stride, b, padded, n, sums); \
    break;

VNNI static __attribute__((noinline)) void tile_vnni(const uint8_t *a, int64_t stride, const int8_t *b, int64_t padded,
                                                     int rows, __m256i *sums) {
  switch (rows) {
    CASE(tile_vnni_of, 1)
    CASE(tile_vnni_of, 2)
    CASE(tile_vnni_of, 3)
    CASE(tile_vnni_of, 4)
    CASE(tile_vnni_of, 5)
    CASE(tile_vnni_of, 6)
  }
}

// The same with AVX-512, for up to 12 tokens and two panels
#define VNNI_512 __attribute__((target("avx512f,avx512bw,avx512vnni")))
VNNI_512 static inline __attribute__((always_inline)) void tile_512_of(const uint8_t *a, int64_t stride,
                                                                       const int8_t *b, int64_t padded, const int rows,
                                                                       __m512i *sums) {
  __m512i s[2 * WIDE_ROWS];
  const int8_t *second = b + PANEL * padded;
#pragma GCC unroll 24
  for (int i = 0; i < 2 * rows; i++) s[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < padded; k += 4, a += 4, b += 64, second += 64) {
    __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(second);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_set1_epi32(*(const int32_t *)(a + r * stride));
      s[2 * r] = _mm512_dpbusd_epi32(s[2 * r], x, b0);
      s[2 * r + 1] = _mm512_dpbusd_epi32(s[2 * r + 1], x, b1);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < 2 * rows; i++) sums[i] = s[i];
}

VNNI_512 static __attribute__((noinline)) void tile_512(const uint8_t *a, int64_t stride, const int8_t *b,
                                                        int64_t padded, int rows, __m512i *sums) {
  switch (rows) {
    CASE(tile_512_of, 1)
    CASE(tile_512_of, 2)
    CASE(tile_512_of, 3)
    CASE(tile_512_of, 4)
    CASE(tile_512_of, 5)
    CASE(tile_512_of, 6)
    CASE(tile_512_of, 7)
    CASE(tile_512_of, 8)
    CASE(tile_512_of, 9)
    CASE(tile_512_of, 10)
    CASE(tile_512_of, 11)
    CASE(tile_512_of, 12)
  }
}

static inline int64_t tile_rows(int instructions) { return instructions == AVX512_VNNI ? WIDE_ROWS : ROWS; }

static inline int64_t tile_panels(int instructions) { return instructions == AVX512_VNNI ? 2 : 1; }

static inline int has_digits(int instructions) { return instructions == AVX2; }

static void products(int instructions, const uint8_t *a, int64_t stride, const int8_t *low, const int8_t *high,
                     int64_t padded, int64_t rows, int32_t *sums) {
  if (instructions == AVX512_VNNI) {
    tile_512(a, stride, low, padded, rows, (__m512i *)sums);
  } else if (instructions == AVX_VNNI) {
    tile_vnni(a, stride, low, padded, rows, (__m256i *)sums);
  } else {
    tile(a, stride, low, padded, (__m256i *)sums);
    if (!high) return;
    int32_t of_high[ROWS * PANEL] __attribute__((aligned(32)));
    tile(a, stride, high, padded, (__m256i *)of_high);
    for (int i = 0; i < ROWS * PANEL; i++) sums[i] = (int32_t)((uint32_t)sums[i] + 16 * (uint32_t)of_high[i]);
  }
}

static inline __m256 scaled(const int32_t *sums, const int32_t *shift, const float *scales) {
  __m256i sum = _mm256_sub_epi32(_mm256_load_si256((const __m256i *)sums), _mm256_loadu_si256((const __m256i *)shift));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scales));
}

static inline __m256 finished(__m256 v, float scale, const float *biases) {
  v = _mm256_mul_ps(v, _mm256_set1_ps(scale));
  return biases ? _mm256_add_ps(v, _mm256_loadu_ps(biases)) : v;
}

static inline __m256 added(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }

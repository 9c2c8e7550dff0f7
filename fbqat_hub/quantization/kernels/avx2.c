// The packed matmul for x86 CPUs with AVX2: y = scale_x * scale_w * (codes_x - zero_point) @ codes_w^T + bias.
//
// Weights are read as they are stored and expanded 16 outputs at a time into a buffer that stays in the cache, so that
// nothing is kept beside the packed bytes. Products of unsigned codes of x with signed codes of w (vpmaddubsw) are
// summed in 16 bits. A pair of products is at most 2 * 255 * 8 = 4,080, so 8 pairs fit (32,640 < 32,767); then they
// are widened to 32 bits. Codes of more than 4 bits are two digits, w = 16 * high + low with both in -8..8.
//
// Floats are rounded in the order of the reference and without fused multiply-add (-ffp-contract=off), so that y
// equals the reference's to the bit where its fp32 sums are exact.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };         // x and y
enum { ROWS = 6, COLUMNS = 16, STEP = 32 };  // a tile of y, and the inputs that 16 bits sum

// 8 values as float

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

// up to 8 values, the others 0
static inline __m256 load_some(const void *x, int64_t i, int64_t n, int dtype) {
  if (n >= 8) return load8(x, i, dtype);
  char buffer[32] = {0};
  size_t size = dtype == FLOAT32 ? 4 : 2;
  memcpy(buffer, (const char *)x + i * size, n * size);
  return load8(buffer, 0, dtype);
}

static inline void store_some(void *y, int64_t i, int64_t n, int dtype, __m256 v) {
  if (n >= 8) {
    store8(y, i, dtype, v);
    return;
  }
  char buffer[32];
  size_t size = dtype == FLOAT32 ? 4 : 2;
  store8(buffer, 0, dtype, v);
  memcpy((char *)y + i * size, buffer, n * size);
}

// the largest magnitude of a token; NaN if it has one
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

// round(x / scale) + zero_point, held in 0..255; `padded` codes, those beyond n are 0. Gives whether x has a NaN, for
// which there is no code.
static int quantize(const void *x, int64_t n, int64_t padded, int dtype, float scale, int zero_point, uint8_t *codes) {
  const __m256 s = _mm256_set1_ps(scale);
  __m256 nan = _mm256_setzero_ps();
  const __m256 lowest = _mm256_set1_ps(-zero_point), highest = _mm256_set1_ps(255 - zero_point);
  for (int64_t i = 0; i < n; i += 8) {
    __m256 steps = _mm256_div_ps(load_some(x, i, n - i, dtype), s);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(steps, steps, _CMP_UNORD_Q));
    __m256i v = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(steps, lowest), highest));
    v = _mm256_add_epi32(v, _mm256_set1_epi32(zero_point));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    if (n - i < 8)
      memcpy(codes + i, &bytes, n - i);
    else
      memcpy(codes + i, &bytes, 8);  // a store, where a length that is not known is a call
  }
  memset(codes + n, 0, padded - n);
  return _mm256_movemask_ps(nan) != 0;
}

// 32 codes of an output, from input i: signed digits `low`, and `high` where codes have more than 4 bits
static inline void expand(const uint8_t *row, int64_t i, int64_t n, int wide, __m256i *low, __m256i *high) {
  const __m256i eight = _mm256_set1_epi8(8), nibble = _mm256_set1_epi8(15);
  if (wide) {
    uint8_t buffer[STEP] = {0};
    if (n - i < STEP) memcpy(buffer, row + i, n - i);
    __m256i codes = _mm256_loadu_si256((const __m256i *)(n - i < STEP ? buffer : row + i));
    *low = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(codes, nibble), eight), eight);
    __m256i rest = _mm256_sub_epi8(codes, *low);  // 16 * high; 128 is -128 in 8 bits
    __m256i digit = _mm256_and_si256(_mm256_srli_epi16(rest, 4), nibble);
    digit = _mm256_sub_epi8(_mm256_xor_si256(digit, eight), eight);
    __m256i over = _mm256_and_si256(_mm256_cmpeq_epi8(digit, _mm256_set1_epi8(-8)),
                                    _mm256_cmpgt_epi8(codes, _mm256_setzero_si256()));
    *high = _mm256_blendv_epi8(digit, eight, over);
    return;
  }
  uint8_t buffer[STEP / 2] = {0};
  if (n - i < STEP) {
    memcpy(buffer, row + i / 2, (n - i + 1) / 2);
    if (n % 2) buffer[(n - i) / 2] &= 15;
  }
  __m128i bytes = _mm_loadu_si128((const __m128i *)(n - i < STEP ? buffer : row + i / 2));
  __m128i first = _mm_and_si128(bytes, _mm_set1_epi8(15));
  __m128i second = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  *low = _mm256_sub_epi8(_mm256_xor_si256(both, eight), eight);
}

// 8 rows of 8 x 4 bytes to 8 steps of 8 outputs, 2 * 32 bytes apart; adds each output's codes to `sums`
static void spread(const __m256i *r, int8_t *to, __m256i *sums) {
  __m256i a[8], b[8], pairs = _mm256_setzero_si256();
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 8; i++) {
    __m256i v = i < 4 ? _mm256_permute2x128_si256(b[i], b[i + 4], 0x20)
                      : _mm256_permute2x128_si256(b[i - 4], b[i], 0x31);
    _mm256_store_si256((__m256i *)(to + 2 * 32 * i), v);
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), v));
  }
  *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// up to 16 outputs into panels of their low and high digits; `sums` of their codes
static void expand_panel(const uint8_t *weight, int64_t stride, int64_t outputs, int64_t n, int wide, int8_t *low,
                         int8_t *high, int32_t *sums) {
  for (int part = 0; part < 2; part++) {
    __m256i sum_low = _mm256_setzero_si256(), sum_high = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += STEP) {
      __m256i rows[8], high_rows[8];
      for (int j = 0; j < 8; j++) {
        rows[j] = high_rows[j] = _mm256_setzero_si256();
        if (8 * part + j < outputs) expand(weight + (8 * part + j) * stride, i, n, wide, rows + j, high_rows + j);
      }
      spread(rows, low + i * COLUMNS + 32 * part, &sum_low);
      if (wide) spread(high_rows, high + i * COLUMNS + 32 * part, &sum_high);
    }
    _mm256_storeu_si256((__m256i *)sums + part, _mm256_add_epi32(sum_low, _mm256_slli_epi32(sum_high, 4)));
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

// Codes of x: [tokens, in], `stride` values from a token to the next. scale: fp32 [tokens], found if `per_token`, else
// read; that of a token with a NaN becomes NaN. codes: [tokens, padded].
void fbqat_quantize(const void *x, int64_t stride, int64_t tokens, int64_t in, int dtype, int per_token, float *scale,
                    int zero_point, uint8_t *codes, int64_t padded, int threads) {
  const size_t size = dtype == FLOAT32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t m = 0; m < tokens; m++) {
    const void *token = (const char *)x + m * stride * size;
    if (per_token) {
      float most = largest(token, in, dtype);
      scale[m] = (most < 1e-8f ? 1e-8f : most) / 127.0f;
    }
    if (quantize(token, in, padded, dtype, scale[m], zero_point, codes + m * padded)) scale[m] = __builtin_nanf("");
  }
}

// y: [tokens, out] from the codes of fbqat_quantize, whose memory has room for tokens rounded up to 6, and `in` rounded
// up to 32 of each. panels: `threads` times 2 * 16 * (in rounded up to 32) bytes to work in, 32-byte aligned. The rest
// is as packed_linear_reference has it.
void fbqat_multiply(const uint8_t *codes, int64_t tokens, int64_t in, const float *scale, int zero_point,
                    const uint8_t *weight, int64_t weight_stride, int64_t out, int wide, const float *weight_scale,
                    const float *bias, int8_t *panels, void *y, int dtype, int threads) {
  const int64_t padded = (in + STEP - 1) / STEP * STEP;
#pragma omp parallel num_threads(threads)
  {
    int8_t *low = panels + omp_get_thread_num() * 2 * COLUMNS * padded, *high = low + COLUMNS * padded;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < out; n += COLUMNS) {
      const int64_t outputs = out - n < COLUMNS ? out - n : COLUMNS;
      int32_t code_sums[COLUMNS];
      float scales[COLUMNS] = {0}, biases[COLUMNS] = {0};
      expand_panel(weight + n * weight_stride, weight_stride, outputs, in, wide, low, high, code_sums);
      memcpy(scales, weight_scale + n, outputs * sizeof(float));
      if (bias) memcpy(biases, bias + n, outputs * sizeof(float));
      __m256i shift[2];
      for (int part = 0; part < 2; part++)
        shift[part] = _mm256_mullo_epi32(_mm256_loadu_si256((const __m256i *)code_sums + part),
                                         _mm256_set1_epi32(zero_point));
      for (int64_t m = 0; m < tokens; m += ROWS) {
        __m256i sums[2 * ROWS], high_sums[2 * ROWS];
        tile(codes + m * padded, padded, low, padded, sums);
        if (wide) {
          tile(codes + m * padded, padded, high, padded, high_sums);
          for (int i = 0; i < 2 * ROWS; i++)
            sums[i] = _mm256_add_epi32(sums[i], _mm256_slli_epi32(high_sums[i], 4));
        }
        for (int r = 0; r < ROWS && m + r < tokens; r++) {
          const __m256 s = _mm256_set1_ps(scale[m + r]);
          for (int64_t part = 0; part < 2 && 8 * part < outputs; part++) {
            __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[2 * r + part], shift[part]));
            v = _mm256_mul_ps(_mm256_mul_ps(v, _mm256_loadu_ps(scales + 8 * part)), s);
            if (bias) v = _mm256_add_ps(v, _mm256_loadu_ps(biases + 8 * part));
            store_some(y, (m + r) * out + n + 8 * part, outputs - 8 * part, dtype, v);
          }
        }
      }
    }
  }
}

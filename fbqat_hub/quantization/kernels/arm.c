// The packed matmul for ARM CPUs with the dot products of ARMv8.2: as x86.c, whose comments hold here too.
//
// Products are of signed codes (sdot), so that those of x are stored less 128. Weights are expanded 16 outputs at a
// time.

#include <arm_neon.h>

typedef struct {
  float32x4_t low, high;
} eight;
enum { CODE_OF_ZERO = 128 };

#include "packed_linear.h"

enum { ROWS = 4 };  // a tile of y: 4 tokens and a panel

static inline eight load8(const void *x, int64_t i, int dtype) {
  if (dtype == FLOAT32) return (eight){vld1q_f32((const float *)x + i), vld1q_f32((const float *)x + i + 4)};
  uint16x8_t half = vld1q_u16((const uint16_t *)x + i);
  if (dtype == FLOAT16) {
    float16x8_t v = vreinterpretq_f16_u16(half);
    return (eight){vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
  }
  return (eight){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
                 vreinterpretq_f32_u32(vshll_high_n_u16(half, 16))};
}

static inline uint16x4_t to_bfloat16(float32x4_t v) {  // to the nearest, ties to even; a NaN stays one
  uint32x4_t bits = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7FC00000)), 16);
}

static inline void store8(void *y, int64_t i, int dtype, eight v) {
  if (dtype == FLOAT32) {
    vst1q_f32((float *)y + i, v.low);
    vst1q_f32((float *)y + i + 4, v.high);
  } else if (dtype == FLOAT16) {
    float16x8_t half = vcombine_f16(vcvt_f16_f32(v.low), vcvt_f16_f32(v.high));
    vst1q_u16((uint16_t *)y + i, vreinterpretq_u16_f16(half));
  } else {
    vst1q_u16((uint16_t *)y + i, vcombine_u16(to_bfloat16(v.low), to_bfloat16(v.high)));
  }
}

// vmaxq keeps a NaN
static float largest(const void *x, int64_t n, int dtype) {
  float32x4_t most = vdupq_n_f32(0);
  for (int64_t i = 0; i < n; i += 8) {
    eight v = load_some(x, i, n - i, dtype);
    most = vmaxq_f32(most, vmaxq_f32(vabsq_f32(v.low), vabsq_f32(v.high)));
  }
  return vmaxvq_f32(most);
}

static int quantize(const void *x, int64_t n, int interleaved, int dtype, float scale, int zero_point, uint8_t *codes) {
  const float32x4_t s = vdupq_n_f32(scale), lowest = vdupq_n_f32(-zero_point), highest = vdupq_n_f32(255 - zero_point);
  const int32x4_t offset = vdupq_n_s32(zero_point - 128);
  const uint8x8_t order = vld1_u8(INTERLEAVED);
  uint32x4_t numbers = vdupq_n_u32(~0u);
  (void)interleaved;  // always
  for (int64_t i = 0; i < n; i += 8) {
    eight v = load_some(x, i, n - i, dtype);
    int32x4_t whole[2];
    for (int j = 0; j < 2; j++) {
      float32x4_t steps = vdivq_f32(j ? v.high : v.low, s);
      numbers = vandq_u32(numbers, vceqq_f32(steps, steps));
      whole[j] = vaddq_s32(vcvtnq_s32_f32(vminq_f32(vmaxq_f32(steps, lowest), highest)), offset);
    }
    int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(whole[0]), vmovn_s32(whole[1])));
    vst1_u8(codes + i, vtbl1_u8(vreinterpret_u8_s8(bytes), order));
  }
  return vminvq_u32(numbers) == 0;
}

// 16 bytes of each of up to 4 rows as 4 vectors of 4 bytes a row. Rows of bytes (`wide`) are interleaved as x is.
static inline void transpose(const uint8_t *row, int64_t stride, int64_t rows, int64_t from, int64_t size, int wide,
                             int odd, uint8x16_t *found) {
  uint32x4_t r[4];
  for (int j = 0; j < 4; j++) {
    uint8_t buffer[16];
    uint8x16_t bytes = vld1q_u8(sixteen(row + j * stride, from, j < rows ? size : 0, odd, buffer));
    r[j] = vreinterpretq_u32_u8(wide ? vqtbl1q_u8(bytes, vld1q_u8(INTERLEAVED)) : bytes);
  }
  uint64x2_t a[4];
  for (int j = 0; j < 4; j += 2) {
    a[j] = vreinterpretq_u64_u32(vzip1q_u32(r[j], r[j + 1]));
    a[j + 1] = vreinterpretq_u64_u32(vzip2q_u32(r[j], r[j + 1]));
  }
  for (int j = 0; j < 2; j++) {
    found[2 * j] = vreinterpretq_u8_u64(vzip1q_u64(a[j], a[j + 2]));
    found[2 * j + 1] = vreinterpretq_u8_u64(vzip2q_u64(a[j], a[j + 2]));
  }
}

static void expand_panel(const uint8_t *weight, int64_t stride, int64_t outputs, int64_t n, int wide, int8_t *panel,
                         int8_t *high, int32_t *sums) {
  const int8x16_t code = vld1q_s8(CODES), ones = vdupq_n_s8(1);
  (void)high;
  for (int part = 0; part < 4; part++) {
    const uint8_t *row = weight + 4 * part * stride;
    const int64_t rows = outputs - 4 * part;
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t i = 0; i < n; i += STEP) {
      int8x16_t codes[8];
      uint8x16_t bytes[8];
      if (wide) {
        transpose(row, stride, rows, i, n, 1, 0, bytes);
        transpose(row, stride, rows, i + 16, n, 1, 0, bytes + 4);
        for (int j = 0; j < 8; j++) codes[j] = vreinterpretq_s8_u8(bytes[j]);
      } else {
        transpose(row, stride, rows, i / 2, (n + 1) / 2, 0, n % 2, bytes);
        for (int j = 0; j < 4; j++) {
          codes[2 * j] = vqtbl1q_s8(code, vandq_u8(bytes[j], vdupq_n_u8(15)));
          codes[2 * j + 1] = vqtbl1q_s8(code, vshrq_n_u8(bytes[j], 4));
        }
      }
      for (int j = 0; j < 8; j++) {
        sum = vdotq_s32(sum, codes[j], ones);
        vst1q_s8(panel + i * PANEL + 64 * j + 16 * part, codes[j]);
      }
    }
    vst1q_s32(sums + 4 * part, sum);
  }
}

// int32 sums of a number of tokens that the compiler knows with a panel of 16 outputs
static inline __attribute__((always_inline)) void tile(const uint8_t *a, int64_t stride, const int8_t *b,
                                                       int64_t padded, const int rows, int32_t *sums) {
  int32x4_t s[4 * ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < 4 * rows; i++) s[i] = vdupq_n_s32(0);
  for (int64_t k = 0; k < padded; k += 4, a += 4, b += 64) {
    int8x16_t weights[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) weights[i] = vld1q_s8(b + 16 * i);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      int8x16_t x = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(a + r * stride)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) s[4 * r + i] = vdotq_s32(s[4 * r + i], weights[i], x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4 * rows; i++) vst1q_s32(sums + 4 * i, s[i]);
}

static inline int64_t tile_rows(int instructions) { return (void)instructions, ROWS; }

static inline int64_t tile_panels(int instructions) { return (void)instructions, 1; }

static inline int has_digits(int instructions) { return (void)instructions, 0; }

static void products(int instructions, const uint8_t *a, int64_t stride, const int8_t *panel, const int8_t *high,
                     int64_t padded, int64_t rows, int32_t *sums) {
  (void)instructions, (void)high;
  switch (rows) {
    case 1:
      tile(a, stride, panel, padded, 1, sums);
      break;
    case 2:
      tile(a, stride, panel, padded, 2, sums);
      break;
    case 3:
      tile(a, stride, panel, padded, 3, sums);
      break;
    default:
      tile(a, stride, panel, padded, 4, sums);
  }
}

static inline float32x4_t scaled4(const int32_t *sums, const int32_t *shift, const float *scales) {
  return vmulq_f32(vcvtq_f32_s32(vsubq_s32(vld1q_s32(sums), vld1q_s32(shift))), vld1q_f32(scales));
}

static inline eight scaled(const int32_t *sums, const int32_t *shift, const float *scales) {
  return (eight){scaled4(sums, shift, scales), scaled4(sums + 4, shift + 4, scales + 4)};
}

static inline eight added(eight a, eight b) { return (eight){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }

static inline eight finished(eight v, float scale, const float *biases) {
  v = (eight){vmulq_n_f32(v.low, scale), vmulq_n_f32(v.high, scale)};
  return biases ? added(v, load8(biases, 0, FLOAT32)) : v;
}

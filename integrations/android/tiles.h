// A picture decoded in tiles, as the bundle's tiles.py does it: what needs no ONNX Runtime.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "files.h"
#include "json.h"

struct Size {
  std::size_t height, width;
};

inline Size size_of(const Json& pair) {
  return {static_cast<std::size_t>(pair.list[0].number), static_cast<std::size_t>(pair.list[1].number)};
}

// The first `overlap` rows (or columns) of a tile [3, H, W] go over linearly from the last of `before`.
inline void blend(const std::vector<float>& before, std::vector<float>& pixels, Size tile, std::size_t overlap,
                  bool rows) {
  const Size part = rows ? Size{overlap, tile.width} : Size{tile.height, overlap};
  for (std::size_t plane = 0; plane < 3; ++plane) {
    for (std::size_t y = 0; y < part.height; ++y) {
      for (std::size_t x = 0; x < part.width; ++x) {
        const double share = static_cast<double>(rows ? y : x) / static_cast<double>(overlap);
        const std::size_t to = (plane * tile.height + y) * tile.width + x;
        const std::size_t from = to + (rows ? (tile.height - overlap) * tile.width : tile.width - overlap);
        pixels[to] = before[from] * static_cast<float>(1 - share) + pixels[to] * static_cast<float>(share);
      }
    }
  }
}

// Values [C, H, W] of the whole picture, which a decoder's stages read and make.
struct Map {
  Size size;
  std::vector<float> values;

  std::size_t channels() const { return values.size() / (size.height * size.width); }
};

// A group norm as a product and a sum, for each channel.
struct Norm {
  std::vector<float> scale, shift;
};

inline Norm norm_of(const Map& source, const Json& described, const std::vector<float>& weight,
                    const std::vector<float>& bias) {
  const auto groups = static_cast<std::size_t>(described.at("groups").number);
  const double epsilon = described.at("epsilon").number;
  const std::size_t share = weight.size() / groups, count = source.values.size() / groups;
  Norm norm{std::vector<float>(weight.size()), std::vector<float>(weight.size())};
  for (std::size_t group = 0; group < groups; ++group) {
    const float* values = source.values.data() + group * count;
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
    const double mean = sum / static_cast<double>(count);
    for (std::size_t i = 0; i < count; ++i) {
      const double off = static_cast<double>(values[i]) - mean;
      squares += off * off;
    }
    const double narrow = 1 / std::sqrt(squares / static_cast<double>(count) + epsilon);
    for (std::size_t c = group * share; c < (group + 1) * share; ++c) {
      const double scale = static_cast<double>(weight[c]) * narrow;
      norm.scale[c] = static_cast<float>(scale);
      norm.shift[c] = static_cast<float>(static_cast<double>(bias[c]) - mean * scale);
    }
  }
  return norm;
}

// Where tiles start that cover a side and share 2 rows or more with their neighbours.
inline std::vector<std::size_t> starts(std::size_t side, std::size_t tile) {
  const std::size_t last = (side - tile + tile - 3) / (tile - 2);
  std::vector<std::size_t> found;
  for (std::size_t place = 0; place <= last; ++place) {
    found.push_back(place * (side - tile) / std::max<std::size_t>(last, 1));
  }
  return found;
}

// The tile at (top, left), normalized where there is a norm (no scale: none).
inline std::vector<float> cut(const Map& map, Size tile, std::size_t top, std::size_t left, const Norm& norm) {
  std::vector<float> part;
  part.reserve(map.channels() * tile.height * tile.width);
  for (std::size_t c = 0; c < map.channels(); ++c) {
    for (std::size_t y = top; y < top + tile.height; ++y) {
      const float* row = map.values.data() + (c * map.size.height + y) * map.size.width + left;
      for (std::size_t x = 0; x < tile.width; ++x) {
        part.push_back(norm.scale.empty() ? row[x] : row[x] * norm.scale[c] + norm.shift[c]);
      }
    }
  }
  return part;
}

// A tile [C, h, w] at (top, left) of the map. Inside the picture its first row and column lack a neighbour and are left
// out, its last ones are written again by the next tile.
inline void paste(Map& map, const std::vector<float>& part, Size tile, std::size_t top, std::size_t left,
                  std::size_t factor) {
  const std::size_t first_row = top ? factor : 0, first_column = left ? factor : 0;
  for (std::size_t c = 0; c < map.channels(); ++c) {
    for (std::size_t y = first_row; y < tile.height; ++y) {
      const float* row = part.data() + (c * tile.height + y) * tile.width;
      std::copy(row + first_column, row + tile.width,
                map.values.data() + (c * map.size.height + factor * top + y) * map.size.width + factor * left +
                    first_column);
    }
  }
}

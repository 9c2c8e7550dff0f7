// Files of a bundle: whole texts, SHA-256 (FIPS 180-4), and float tensors of safetensors files.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

inline std::ifstream open_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  return file;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file = open_file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

class Sha256 {
 public:
  void add(const uint8_t* data, std::size_t count) {
    length_ += count;
    for (std::size_t i = 0; i < count; ++i) {
      block_[filled_++] = data[i];
      if (filled_ == 64) compress();
    }
  }

  std::string hex() {
    const uint64_t bits = 8 * length_;
    const uint8_t one = 0x80, zero = 0;
    add(&one, 1);
    while (filled_ != 56) add(&zero, 1);
    for (int shift = 56; shift >= 0; shift -= 8) {
      const auto byte = static_cast<uint8_t>(bits >> shift);
      add(&byte, 1);
    }
    std::string text;
    for (uint32_t word : state_) {
      char part[9];
      std::snprintf(part, sizeof part, "%08x", static_cast<unsigned>(word));
      text += part;
    }
    return text;
  }

 private:
  // The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
  static constexpr std::array<uint32_t, 64> kRound = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

  static uint32_t turned(uint32_t word, int by) { return (word >> by) | (word << (32 - by)); }

  void compress() {
    filled_ = 0;
    std::array<uint32_t, 64> w{};
    for (int i = 0; i < 16; ++i) {
      for (int byte = 0; byte < 4; ++byte) w[i] = (w[i] << 8) | block_[4 * i + byte];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t first = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const uint32_t second = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + first + w[i - 7] + second;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (int i = 0; i < 64; ++i) {
      const uint32_t up = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const uint32_t down = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + up, d = c, c = b, b = a, a = up + down;
    }
    const std::array<uint32_t, 8> changed = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state_[i] += changed[i];
  }

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_{};
  std::size_t filled_ = 0;
  uint64_t length_ = 0;
};

inline std::string sha256_of(const std::string& path) {
  std::ifstream file = open_file(path);
  std::vector<char> part(1 << 20);
  Sha256 hash;
  do {
    file.read(part.data(), static_cast<std::streamsize>(part.size()));
    hash.add(reinterpret_cast<const uint8_t*>(part.data()), static_cast<std::size_t>(file.gcount()));
  } while (file);
  return hash.hex();
}

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// The float32 tensors of a safetensors file, read when they are asked for: an 8-byte length, a JSON header, the data.
class Safetensors {
 public:
  explicit Safetensors(const std::string& path) : path_(path), file_(open_file(path)) {
    uint64_t length = 0;
    file_.read(reinterpret_cast<char*>(&length), sizeof length);
    if (!file_ || length > kLongestHeader) throw std::runtime_error(path + " is no safetensors file");
    std::string header(length, '\0');
    file_.read(header.data(), static_cast<std::streamsize>(length));
    if (!file_) throw std::runtime_error(path + " ends in its header");
    header_ = JsonReader(header).read();
    data_ = sizeof length + length;
  }

  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& [name, described] : header_.object) {
      if (name != "__metadata__") found.push_back(name);
    }
    return found;
  }

  Tensor read(const std::string& name) {
    const Json& described = header_.at(name);
    if (described.at("dtype").text != "F32") throw std::runtime_error(path_ + ": " + name + " is not float32");
    const std::vector<Json>& range = described.at("data_offsets").list;
    Tensor tensor;
    std::size_t count = 1;
    for (const Json& side : described.at("shape").list) {
      tensor.shape.push_back(static_cast<int64_t>(side.number));
      count *= static_cast<std::size_t>(side.number);
    }
    if (range.size() != 2 || range[1].number - range[0].number != 4.0 * static_cast<double>(count)) {
      throw std::runtime_error(path_ + ": " + name + " has another size than its shape says");
    }
    tensor.values.resize(count);
    file_.clear();
    file_.seekg(static_cast<std::streamoff>(data_ + static_cast<uint64_t>(range[0].number)));
    file_.read(reinterpret_cast<char*>(tensor.values.data()), static_cast<std::streamsize>(4 * count));
    if (!file_) throw std::runtime_error(path_ + " ends in " + name);
    return tensor;
  }

 private:
  static constexpr uint64_t kLongestHeader = 100'000'000;
  std::string path_;
  std::ifstream file_;
  Json header_;
  uint64_t data_ = 0;
};

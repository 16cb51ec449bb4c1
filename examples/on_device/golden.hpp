// Test images, and how embeddings of them compare with a file's golden values. Plain C++17: no library is needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace qface {

using Embedding = std::vector<float>;

// RGB bytes [3, height, width] of test image `number`.
inline std::vector<uint8_t> golden_image(uint32_t number, int height, int width) {
  uint32_t state = (number + 1) * 2654435761u;
  auto draw = [&] { return int((state = state * 1664525u + 1013904223u) >> 24); };
  const int rows = height / 16 + 2, columns = width / 16 + 2;
  std::vector<uint8_t> image;
  for (int channel = 0; channel < 3; ++channel) {
    std::vector<int> grid(rows * columns);
    for (int& point : grid) point = draw();
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        const int down = y % 16, right = x % 16, corner = y / 16 * columns + x / 16;
        auto between = [&](int left) { return (16 - right) * grid[left] + right * grid[left + 1]; };
        const int smooth = (16 - down) * between(corner) + down * between(corner + columns);
        image.push_back(uint8_t((15 * smooth >> 12) + (draw() >> 4)));
      }
  }
  return image;
}

// 32-bit FNV-1a of the bytes of an embedding, on a little-endian processor.
inline uint32_t digest(const Embedding& embedding) {
  uint32_t found = 2166136261u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(embedding.data());
  for (size_t i = 0; i < embedding.size() * sizeof(float); ++i) found = (found ^ bytes[i]) * 16777619u;
  return found;
}

inline double cosine(const Embedding& one, const Embedding& other) {
  double product = 0, first = 0, second = 0;
  for (size_t i = 0; i < one.size(); ++i) {
    product += double(one[i]) * other[i];
    first += double(one[i]) * one[i];
    second += double(other[i]) * other[i];
  }
  return product / std::sqrt(first * second);
}

// The text after `"key": ` up to the end of its list or value. The metadata are flat JSON with one space after a colon,
// which is all that this reads; take a JSON library where you have one.
inline std::string json_value(const std::string& json, const std::string& key) {
  const std::string name = "\"" + key + "\": ";
  if (json.find(name) == std::string::npos) return "";
  const size_t start = json.find(name) + name.size();
  const bool list = json[start] == '[';
  return json.substr(start, json.find_first_of(list ? "]" : ",}", start) - start);
}

inline std::vector<double> json_numbers(const std::string& json, const std::string& key) {
  std::vector<double> numbers;
  const std::string list = json_value(json, key);
  for (const char* at = list.c_str(); *at;) {
    char* end = nullptr;
    const double number = std::strtod(at, &end);
    if (end == at) ++at;
    else numbers.push_back(number), at = end;
  }
  return numbers;
}

// The embeddings in a list of base64 texts.
inline std::vector<Embedding> json_embeddings(const std::string& json, const std::string& key) {
  static const std::string alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<Embedding> embeddings;
  std::vector<uint8_t> bytes;
  uint32_t bits = 0;
  int count = 0;
  bool inside = false;
  for (char c : json_value(json, key)) {
    if (c == '"' && inside) {
      embeddings.emplace_back(bytes.size() / sizeof(float));
      std::memcpy(embeddings.back().data(), bytes.data(), embeddings.back().size() * sizeof(float));
    }
    if (c == '"') {
      inside = !inside, bytes.clear(), count = 0;
    } else if (inside && c != '=') {
      bits = bits << 6 | uint32_t(alphabet.find(c)), count += 6;
      if (count >= 8) bytes.push_back(uint8_t(bits >> (count -= 8)));
    }
  }
  return embeddings;
}

struct Golden {
  bool equal;           // the same bits are asked for,
  double least_cosine;  // or else this cosine
  std::vector<Embedding> embeddings;  // of the first images
  std::vector<double> digests;        // of the images after those

  explicit Golden(const std::string& json)
      : equal(json_value(json, "tolerance") == "\"equal\""),
        least_cosine(equal ? 1 : std::stod(json_value(json, "tolerance"))),
        embeddings(json_embeddings(json, "embeddings")),
        digests(json_numbers(json, "digests")) {}

  size_t images() const { return embeddings.size() + digests.size(); }

  // `found`: embeddings of all test images. Returns whether they are as trained, and says so in `words`.
  bool compare(const std::vector<Embedding>& found, std::string& words) const {
    size_t different = 0;
    double least = 1;
    for (size_t i = 0; i < images(); ++i) {
      if (i >= embeddings.size()) {
        different += digest(found[i]) != digests[i - embeddings.size()];
        continue;
      }
      const double near = cosine(embeddings[i], found[i]);
      least = std::min(least, near);
      different += equal ? embeddings[i] != found[i] : !(near >= least_cosine);
    }
    words = different ? "DIFFERS from what was trained: " : "computes what was trained: ";
    words += std::to_string(different) + " of " + std::to_string(images()) + " embeddings differ, ";
    words += "least cosine of the first " + std::to_string(embeddings.size()) + " is " + std::to_string(least);
    return different == 0;
  }
};

}  // namespace qface

// Test that onnxruntime on this device gives the trained embeddings, for integer files with uint8 input.
// Take onnxruntime's headers and library from its release archives:
//   g++ -std=c++17 -I onnxruntime/include selftest.cpp -L onnxruntime/lib -lonnxruntime -o selftest
//   ./selftest student.onnx
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

// Return a test image, RGB bytes [3, height, width]: interpolated random bytes 16 pixels apart, and noise.
std::vector<uint8_t> golden_image(uint32_t number, uint32_t height, uint32_t width) {
  const auto random = [=](uint32_t plane, uint32_t y, uint32_t x) {
    uint32_t word = ((6 * number + plane) << 20) + (y << 10) + x;
    word = (word ^ word >> 16) * 0x7feb352d;
    return ((word ^ word >> 15) * 0x846ca68b) >> 24;
  };
  std::vector<uint8_t> image;
  for (uint32_t plane = 0; plane < 3; ++plane)
    for (uint32_t y = 0; y < height; ++y)
      for (uint32_t x = 0; x < width; ++x) {
        const uint32_t row = y / 16, down = y % 16, column = x / 16, right = x % 16;
        const auto across = [&](uint32_t r) {
          return (16 - right) * random(plane, r, column) + right * random(plane, r, column + 1);
        };
        const uint32_t smooth = (16 - down) * across(row) + down * across(row + 1);
        image.push_back(uint8_t((15 * smooth >> 12) + (random(plane + 3, y, x) >> 4)));
      }
  return image;
}

// Return the CRC-32 of an embedding; the processor must be little-endian.
uint32_t digest(const float* embedding, size_t count) {
  uint32_t found = ~0u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(embedding);
  for (size_t i = 0; i < count * sizeof(float); ++i) {
    found ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) found = found >> 1 ^ (found & 1) * 0xedb88320u;
  }
  return ~found;
}

// Return the list of integers under `key` of a JSON object; in an application, use a JSON library.
std::vector<uint32_t> integers(const std::string& json, const std::string& key) {
  std::vector<uint32_t> found;
  const size_t at = json.find("\"" + key + "\": [");
  if (at == std::string::npos) return found;
  const char* text = json.c_str() + json.find('[', at);
  while (*text != ']') {
    char* end = nullptr;
    const unsigned long long number = std::strtoull(text + 1, &end, 10);
    if (end == text + 1) break;
    found.push_back(uint32_t(number));
    text = end;
  }
  return found;
}

std::string metadata(const Ort::Session& session, const char* key) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
  return text ? text.get() : "";
}

int main(int, char** arguments) {
  Ort::Env env;
  Ort::SessionOptions options;
  Ort::Session session(env, arguments[1], options);
  if (metadata(session, "weight_bits") == "8") {  // without this option they saturate on old x86 processors
    options.AddConfigEntry("session.x64quantprecision", "1");
    session = Ort::Session(env, arguments[1], options);
  }
  const auto size = integers(metadata(session, "preprocessing"), "size");
  const auto digests = integers(metadata(session, "golden"), "digests");
  if (digests.empty() || metadata(session, "input") != "uint8") {
    std::fprintf(stderr, "%s is no file of integers that reads bytes and holds golden values\n", arguments[1]);
    return 2;
  }
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t shape[] = {1, 3, size[0], size[1]};
  const char *input = "images", *output = "embedding";
  size_t different = 0;
  for (uint32_t number = 0; number < digests.size(); ++number) {
    auto pixels = golden_image(number, size[0], size[1]);
    const auto image = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape, 4);
    const auto found = session.Run(Ort::RunOptions{nullptr}, &input, &image, 1, &output, 1);
    const size_t count = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    different += digest(found[0].GetTensorData<float>(), count) != digests[number];
  }
  const char* verdict = different ? "DIFFERS from" : "computes";
  std::printf("%s what was trained: %zu of %zu embeddings differ, onnxruntime %s\n", verdict, different, digests.size(),
              OrtGetApiBase()->GetVersionString());
  return different ? 1 : 0;
}

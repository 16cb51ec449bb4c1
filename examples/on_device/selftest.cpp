// Say whether onnxruntime computes on this device what was trained. With onnxruntime's C++ API, from its release archives:
//   g++ -std=c++17 -I onnxruntime/include selftest.cpp -L onnxruntime/lib -lonnxruntime -o selftest
//   ./selftest student.onnx
// The tests compile golden.hpp, which does not need onnxruntime, and compare its images and verdicts with Python's.
// This file was run once by hand, with headers of onnxruntime 1.12 and its library 1.31.1; no test does that.
#include <onnxruntime_cxx_api.h>

#include <cstdio>

#include "golden.hpp"

class Model {
 public:
  explicit Model(const char* file) : session_(open(file, Ort::SessionOptions())) {
    if (metadata("weight_bits") == "8") {  // needs a mode that is exact on old x86 processors
      Ort::SessionOptions options;
      options.AddConfigEntry("session.x64quantprecision", "1");
      session_ = open(file, options);
    }
    const std::vector<double> size = qface::json_numbers(metadata("preprocessing"), "size");
    height = int(size[0]), width = int(size[1]);
  }

  std::string metadata(const char* key) const {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    return text ? text.get() : "";
  }

  // The embedding of RGB bytes [3, height, width].
  qface::Embedding embed(std::vector<uint8_t> pixels) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const int64_t shape[] = {1, 3, height, width};
    std::vector<float> floats;
    Ort::Value image{nullptr};
    if (metadata("input") == "uint8") {
      image = Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape, 4);
    } else {
      floats = normalized(pixels);
      image = Ort::Value::CreateTensor<float>(memory, floats.data(), floats.size(), shape, 4);
    }
    const char *input = "images", *output = "embedding";
    const auto outputs = session_.Run(Ort::RunOptions{nullptr}, &input, &image, 1, &output, 1);
    const float* first = outputs[0].GetTensorData<float>();
    return {first, first + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount()};
  }

  int height = 0, width = 0;

 private:
  static Ort::Session open(const char* file, const Ort::SessionOptions& options) {
    static Ort::Env env;
    return Ort::Session(env, file, options);
  }

  std::vector<float> normalized(const std::vector<uint8_t>& pixels) const {
    const std::string reads = metadata("preprocessing");
    const auto mean = qface::json_numbers(reads, "mean"), std = qface::json_numbers(reads, "std");
    const bool bgr = qface::json_value(reads, "color") == "\"BGR\"";
    const size_t plane = pixels.size() / 3;
    std::vector<float> floats(pixels.size());
    for (size_t i = 0; i < floats.size(); ++i) {
      const size_t channel = i / plane, from = bgr ? 2 - channel : channel;
      floats[i] = (float(pixels[from * plane + i % plane]) - float(mean[channel])) / float(std[channel]);
    }
    return floats;
  }

  Ort::Session session_;
};

int main(int, char** arguments) {
  Model model(arguments[1]);
  const std::string json = model.metadata("golden");
  if (json.empty()) {
    std::fprintf(stderr, "%s holds no golden values\n", arguments[1]);
    return 2;
  }
  const qface::Golden golden(json);
  std::vector<qface::Embedding> found;
  for (size_t number = 0; number < golden.images(); ++number)
    found.push_back(model.embed(qface::golden_image(uint32_t(number), model.height, model.width)));
  std::string words;
  const bool agrees = golden.compare(found, words);
  std::printf("%s, onnxruntime %s\n", words.c_str(), OrtGetApiBase()->GetVersionString());
  return agrees ? 0 : 1;
}

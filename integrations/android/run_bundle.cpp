// Generate a picture from a bundle that `fbqat export` made: the C++ form of the bundle's own generate.py.
//
//   run_bundle BUNDLE --runtime libonnxruntime.so --plugin libonnxruntime_providers_qnn.so --backend libQnnHtp.so
//
// Every graph runs on QNN's HTP backend, or the program ends with an error: nothing falls back to the CPU.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>

#include "files.h"
#include "json.h"
#include "ort_api.h"
#include "tiles.h"

namespace {

constexpr const char* kProvider = "QNNExecutionProvider";
constexpr const char* kUsage =
    "run_bundle BUNDLE [--prompt N] [--embeddings FILE] [--output FILE]\n"
    "           [--runtime FILE] [--plugin FILE] [--backend FILE]\n"
    "  BUNDLE        folder that fbqat export made\n"
    "  --prompt      place of the prompt in its manifest.json (default: 0)\n"
    "  --embeddings  safetensors of a text that fbqat_hub.export.save_embeddings encoded, in the prompt's place\n"
    "  --output      PPM file to write (default: picture.ppm)\n"
    "  --runtime     ONNX Runtime, 1.22 or newer (default: libonnxruntime.so)\n"
    "  --plugin      QNN's execution provider (default: libonnxruntime_providers_qnn.so)\n"
    "  --backend     QNN's HTP backend (default: libQnnHtp.so)\n";

using Values = std::map<std::string, Tensor>;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

// ONNX Runtime with QNN's devices registered.
class Runtime {
 public:
  Runtime(const std::string& library, const std::string& plugin, std::string backend) : backend_(std::move(backend)) {
    void* opened = dlopen(library.c_str(), RTLD_NOW);
    if (!opened) fail(dlerror());
    auto* base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(opened, "OrtGetApiBase"));
    if (!base) fail(library + " is not ONNX Runtime");
    api_ = base()->GetApi(kOrtApiVersion);
    if (!api_) fail(library + " is ONNX Runtime " + base()->GetVersionString() + "; 1.22 or newer is needed");
    check(ort::CreateEnv::of(api_)(kOrtLoggingError, "run_bundle", &environment_));
    check(ort::RegisterExecutionProviderLibrary::of(api_)(environment_, kProvider, plugin.c_str()));
    const OrtEpDevice* const* devices = nullptr;
    std::size_t count = 0;
    check(ort::GetEpDevices::of(api_)(environment_, &devices, &count));
    for (std::size_t i = 0; i < count && !device_; ++i) {
      if (std::strcmp(ort::EpDevice_EpName::of(api_)(devices[i]), kProvider) == 0) device_ = devices[i];
    }
    if (!device_) fail(plugin + " registered no QNN device on this machine");
    check(ort::CreateCpuMemoryInfo::of(api_)(kOrtArenaAllocator, kOrtMemTypeDefault, &memory_));
  }

  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  ~Runtime() {
    if (memory_) ort::ReleaseMemoryInfo::of(api_)(memory_);
    if (environment_) ort::ReleaseEnv::of(api_)(environment_);
  }

  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = ort::GetErrorMessage::of(api_)(status);
    ort::ReleaseStatus::of(api_)(status);
    fail("ONNX Runtime: " + message);
  }

  OrtSession* open(const std::string& path, const Json& provider_options) const {
    OrtSessionOptions* options = nullptr;
    check(ort::CreateSessionOptions::of(api_)(&options));
    const auto free_options = [this](OrtSessionOptions* each) { ort::ReleaseSessionOptions::of(api_)(each); };
    const std::unique_ptr<OrtSessionOptions, decltype(free_options)> owned(options, free_options);
    check(ort::SetIntraOpNumThreads::of(api_)(options, 1));
    check(ort::SetSessionLogSeverityLevel::of(api_)(options, kOrtLoggingError));
    check(ort::AddSessionConfigEntry::of(api_)(options, "session.disable_cpu_ep_fallback", "1"));
    std::vector<const char*> keys = {"backend_path"}, values = {backend_.c_str()};
    for (const auto& [key, value] : provider_options.object) {
      keys.push_back(key.c_str());
      values.push_back(value.text.c_str());
    }
    check(ort::AppendExecutionProvider::of(api_)(options, environment_, &device_, 1, keys.data(), values.data(),
                                                 keys.size()));
    OrtSession* session = nullptr;
    check(ort::CreateSession::of(api_)(environment_, path.c_str(), options, &session));
    return session;
  }

  const OrtApi* api() const { return api_; }
  const OrtMemoryInfo* memory() const { return memory_; }

 private:
  std::string backend_;
  const OrtApi* api_ = nullptr;
  OrtEnv* environment_ = nullptr;
  const OrtEpDevice* device_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
};

// One graph of the bundle. Its tensors go by the names that the manifest has, float32.
class Graph {
 public:
  Graph(const Runtime& runtime, const std::string& folder, const Json& manifest, const std::string& name)
      : runtime_(runtime), described_(manifest.at("graphs").at(name)) {
    session_ = runtime.open(folder + "/" + described_.at("context").text, manifest.at("provider_options"));
  }

  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  ~Graph() { ort::ReleaseSession::of(runtime_.api())(session_); }

  // Reads its inputs from `values`, by name, and adds its outputs there; returns the first output.
  const Tensor& run(Values& values) const {
    const OrtApi* api = runtime_.api();
    const auto free_value = [api](OrtValue* value) { ort::ReleaseValue::of(api)(value); };
    std::vector<std::unique_ptr<OrtValue, decltype(free_value)>> owned;
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> inputs;
    for (const Json& input : described_.at("inputs").list) {
      const std::string& name = input.at("name").text;
      const auto found = values.find(name);
      if (found == values.end()) fail("nothing makes the graph's input " + name);
      Tensor& tensor = found->second;
      const std::vector<int64_t> shape = shape_of(input);
      if (elements(shape) != tensor.values.size()) fail(name + " has another size than the graph's input");
      OrtValue* value = nullptr;
      runtime_.check(ort::CreateTensorWithDataAsOrtValue::of(api)(
          runtime_.memory(), tensor.values.data(), sizeof(float) * tensor.values.size(), shape.data(), shape.size(),
          kOrtTensorFloat, &value));
      owned.emplace_back(value, free_value);
      input_names.push_back(name.c_str());
      inputs.push_back(value);
    }
    for (const Json& output : described_.at("outputs").list) output_names.push_back(output.at("name").text.c_str());
    std::vector<OrtValue*> outputs(output_names.size(), nullptr);
    OrtStatus* status = ort::Run::of(api)(session_, nullptr, input_names.data(), inputs.data(), inputs.size(),
                                          output_names.data(), output_names.size(), outputs.data());
    for (OrtValue* output : outputs) owned.emplace_back(output, free_value);
    runtime_.check(status);
    for (std::size_t i = 0; i < outputs.size(); ++i) values[output_names[i]] = copied(outputs[i], i);
    return values[output_names[0]];
  }

 private:
  static std::vector<int64_t> shape_of(const Json& tensor) {
    std::vector<int64_t> shape;
    for (const Json& side : tensor.at("shape").list) shape.push_back(static_cast<int64_t>(side.number));
    return shape;
  }

  static std::size_t elements(const std::vector<int64_t>& shape) {
    std::size_t count = 1;
    for (int64_t side : shape) count *= static_cast<std::size_t>(side);
    return count;
  }

  Tensor copied(OrtValue* value, std::size_t place) const {
    const OrtApi* api = runtime_.api();
    OrtTensorTypeAndShapeInfo* info = nullptr;
    std::size_t count = 0;
    void* data = nullptr;
    runtime_.check(ort::GetTensorTypeAndShape::of(api)(value, &info));
    OrtStatus* status = ort::GetTensorShapeElementCount::of(api)(info, &count);
    ort::ReleaseTensorTypeAndShapeInfo::of(api)(info);
    runtime_.check(status);
    runtime_.check(ort::GetTensorMutableData::of(api)(value, &data));
    Tensor tensor{shape_of(described_.at("outputs").list[place]), {}};
    if (elements(tensor.shape) != count) fail("an output has another size than the manifest says");
    tensor.values.assign(static_cast<float*>(data), static_cast<float*>(data) + count);
    return tensor;
  }

  const Runtime& runtime_;
  const Json& described_;
  OrtSession* session_ = nullptr;
};

void check_files(const std::string& folder, const Json& manifest) {
  for (const auto& [name, described] : manifest.at("files").object) {
    const std::string found = sha256_of(folder + "/" + name), &wanted = described.at("sha256").text;
    if (found != wanted) fail(name + " is damaged: SHA-256 is " + found + ", the manifest has " + wanted);
  }
}

// The denoiser's inputs of a prompt of the bundle, a branch each (without the prompt, with it).
std::vector<Values> stored_inputs(Safetensors& host, const Json& manifest, int prompt) {
  std::vector<Values> given(static_cast<std::size_t>(manifest.at("sampler").at("branches").number));
  for (std::size_t branch = 0; branch < given.size(); ++branch) {
    const std::string start = "prompt." + std::to_string(prompt) + "." + std::to_string(branch) + ".";
    for (const std::string& name : host.names()) {
      if (name.compare(0, start.size(), start) == 0) given[branch][name.substr(start.size())] = host.read(name);
    }
  }
  return given;
}

void replace_text(Values& given, const std::string& path) {
  Safetensors found(path);
  for (const std::string& name : found.names()) {
    Tensor tensor = found.read(name);
    const auto place = given.find(name);
    if (place == given.end() || place->second.shape != tensor.shape) {
      fail(path + ": " + name + " is not of this bundle's inputs; save the embeddings with the bundle's pipeline");
    }
    place->second = std::move(tensor);
  }
}

// The latents after the last step. Row k of `sampler` [steps, 1 + steps] weighs the noise and all predictions so far.
std::vector<float> sample(const Json& settings, Safetensors& host, const std::vector<std::unique_ptr<Graph>>& denoiser,
                          const std::vector<Values>& given, const Tensor& noise) {
  const Tensor matrix = host.read("sampler"), times = host.read("timestep_embedding");
  const std::size_t width = static_cast<std::size_t>(matrix.shape[1]), side = static_cast<std::size_t>(times.shape[1]);
  const auto scale = static_cast<float>(settings.at("guidance_scale").number);
  std::vector<std::vector<float>> terms = {noise.values};
  Tensor latents = noise;
  for (std::size_t step = 0; step + 1 < width; ++step) {
    const float* time = times.values.data() + step * side;
    std::vector<float> prediction;
    for (const Values& inputs : given) {  // without the prompt, with it
      Values values = inputs;
      values["hidden_states"] = latents;
      values["timestep_embedding"] = {{1, static_cast<int64_t>(side)}, {time, time + side}};
      const Tensor* output = nullptr;
      for (const auto& graph : denoiser) output = &graph->run(values);
      if (prediction.empty()) {
        prediction = output->values;
        continue;
      }
      for (std::size_t i = 0; i < prediction.size(); ++i) {
        prediction[i] = prediction[i] + scale * (output->values[i] - prediction[i]);
      }
    }
    prediction.resize(noise.values.size());  // channels behind it are a learned variance, which is not used
    terms.push_back(std::move(prediction));
    const float* weights = matrix.values.data() + step * width;
    for (std::size_t i = 0; i < latents.values.size(); ++i) {
      float sum = 0;
      for (std::size_t term = 0; term < terms.size(); ++term) sum += weights[term] * terms[term][i];
      latents.values[i] = sum;
    }
  }
  return latents.values;
}

// Tokens [1, h/2 * w/2, 4 C] as latents [1, C, h, w]: each token is a square of 2 x 2.
std::vector<float> unpack_tokens(const std::vector<float>& tokens, std::size_t height, std::size_t width) {
  const std::size_t channels = tokens.size() / (height * width);
  std::vector<float> latents(tokens.size());
  for (std::size_t c = 0; c < channels; ++c) {
    for (std::size_t y = 0; y < height; ++y) {
      for (std::size_t x = 0; x < width; ++x) {
        const std::size_t token = (y / 2) * (width / 2) + x / 2;
        latents[(c * height + y) * width + x] = tokens[(token * channels + c) * 4 + (y % 2) * 2 + x % 2];
      }
    }
  }
  return latents;
}

// The picture [3, H, W] of latents [1, C, h, w], by the graphs of a decoder that is cut at its group norms.
std::vector<float> decode_stages(const Runtime& runtime, const std::string& folder, const Json& manifest,
                                 Safetensors& host, std::vector<float> latents) {
  const std::vector<Json>& stages = manifest.at("decoder_stages").list;
  std::map<std::string, Map> maps;
  maps["latents"] = {size_of(stages.front().at("map")), std::move(latents)};
  for (const Json& stage : stages) {
    const std::string& name = stage.at("graph").text;
    const Graph graph(runtime, folder, manifest, name);
    const Map& source = maps.at(stage.at("source").text);
    const Map* skip = stage.at("skip").kind == Json::Kind::text ? &maps.at(stage.at("skip").text) : nullptr;
    Norm norm;
    if (const Json& described = stage.at("norm"); described.kind == Json::Kind::object) {
      norm = norm_of(source, described, host.read(name + ".weight").values, host.read(name + ".bias").values);
    }
    const Size tile = size_of(stage.at("tile"));
    const auto factor = static_cast<std::size_t>(stage.at("factor").number);
    const Size made_tile{factor * tile.height, factor * tile.width};
    Map made{{factor * source.size.height, factor * source.size.width}, {}};
    for (std::size_t top : starts(source.size.height, tile.height)) {
      for (std::size_t left : starts(source.size.width, tile.width)) {
        Values values;
        values["source"].values = cut(source, tile, top, left, norm);
        if (skip) values["skip"].values = cut(*skip, tile, top, left, {});
        const std::vector<float>& part = graph.run(values).values;
        if (made.values.empty()) {
          const std::size_t channels = part.size() / (made_tile.height * made_tile.width);
          made.values.resize(channels * made.size.height * made.size.width);
        }
        paste(made, part, made_tile, top, left, factor);
      }
    }
    maps[stage.at("makes").text] = std::move(made);
  }
  return std::move(maps.at("picture").values);
}

// The same by one graph; in tiles that overlap where the manifest has them, as tiles.py does it.
std::vector<float> decode(const Graph& decoder, std::vector<float> latents, const Json& manifest) {
  Values values;
  std::vector<float>& part = values["latents"].values;
  const Json& tiles = manifest.at("decoder_tiles");
  if (tiles.kind != Json::Kind::object) {
    part = std::move(latents);
    return decoder.run(values).values;
  }
  const Size whole = size_of(manifest.at("sampler").at("picture_size")), tile = size_of(tiles.at("size")),
             overlap = size_of(tiles.at("overlap"));
  const std::vector<Json>& shape = manifest.at("graphs").at("decoder").at("inputs").list[0].at("shape").list;
  const auto channels = static_cast<std::size_t>(shape[1].number), rows = static_cast<std::size_t>(shape[2].number),
             columns = static_cast<std::size_t>(shape[3].number);
  const std::size_t factor = tile.height / rows, width = whole.width / factor;
  std::vector<float> picture(3 * whole.height * whole.width);
  std::vector<std::vector<float>> above, row;
  for (std::size_t top = 0; top + tile.height <= whole.height; top += tile.height - overlap.height) {
    for (std::size_t left = 0; left + tile.width <= whole.width; left += tile.width - overlap.width) {
      part.clear();
      for (std::size_t line = 0; line < channels * rows; ++line) {
        const std::size_t y = line / rows * (whole.height / factor) + top / factor + line % rows;
        const auto first = latents.begin() + static_cast<std::ptrdiff_t>(y * width + left / factor);
        part.insert(part.end(), first, first + static_cast<std::ptrdiff_t>(columns));
      }
      std::vector<float> pixels = decoder.run(values).values;
      if (!above.empty()) blend(above[row.size()], pixels, tile, overlap.height, true);
      if (!row.empty()) blend(row.back(), pixels, tile, overlap.width, false);
      for (std::size_t line = 0; line < 3 * tile.height; ++line) {  // what the next tiles cover is written again
        const std::size_t y = line / tile.height * whole.height + top + line % tile.height;
        std::copy_n(pixels.begin() + static_cast<std::ptrdiff_t>(line * tile.width), tile.width,
                    picture.begin() + static_cast<std::ptrdiff_t>(y * whole.width + left));
      }
      row.push_back(std::move(pixels));
    }
    above = std::move(row);
    row.clear();
  }
  return picture;
}

// Planes [3, H, W] of values in [-1, 1] as a PPM file (P6).
void write_picture(const std::string& path, const std::vector<float>& planes, std::size_t height, std::size_t width) {
  std::vector<char> pixels(3 * height * width);
  for (std::size_t place = 0; place < height * width; ++place) {
    for (std::size_t colour = 0; colour < 3; ++colour) {
      const float value = 127.5f * planes[colour * height * width + place] + 127.5f;
      const float clipped = std::fmin(std::fmax(value, 0.0f), 255.0f);
      pixels[3 * place + colour] = static_cast<char>(static_cast<uint8_t>(std::nearbyint(clipped)));
    }
  }
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << width << " " << height << "\n255\n";
  file.write(pixels.data(), static_cast<std::streamsize>(pixels.size()));
  if (!file) fail("cannot write " + path);
}

// Fails unless the picture can be written, before it is made.
void check_output(const std::string& path) {
  if (std::filesystem::is_directory(path)) fail("cannot write " + path + ", which is a folder");
  const bool there = std::filesystem::exists(path);
  if (!std::ofstream(path, std::ios::app)) fail("cannot write " + path);
  if (!there) std::filesystem::remove(path);
}

void run(const std::string& folder, std::map<std::string, std::string>& options) {
  const Json manifest = JsonReader(read_text(folder + "/manifest.json")).read();
  const Json& settings = manifest.at("sampler");
  const std::size_t prompts = manifest.at("prompts").list.size();
  char* stop = nullptr;
  const long prompt = std::strtol(options["--prompt"].c_str(), &stop, 10);
  if (options["--prompt"].empty() || *stop != '\0' || prompt < 0 || static_cast<std::size_t>(prompt) >= prompts) {
    fail("prompt " + options["--prompt"] + ": the bundle has " + std::to_string(prompts) + " prompts, counted from 0");
  }
  check_output(options["--output"]);
  check_files(folder, manifest);
  Safetensors host(folder + "/host.safetensors");
  const Tensor noise = host.read("noise." + std::to_string(prompt));
  std::vector<Values> given = stored_inputs(host, manifest, static_cast<int>(prompt));
  if (!options["--embeddings"].empty()) replace_text(given.back(), options["--embeddings"]);
  const Runtime runtime(options["--runtime"], options["--plugin"], options["--backend"]);
  std::vector<std::unique_ptr<Graph>> denoiser;
  for (const Json& part : manifest.at("denoiser").list) {
    denoiser.push_back(std::make_unique<Graph>(runtime, folder, manifest, part.at("graph").text));
  }
  std::vector<float> latents = sample(settings, host, denoiser, given, noise);
  denoiser.clear();  // its memory is the decoder's
  if (const Json& grid = settings.at("token_grid"); grid.kind == Json::Kind::list) {
    const Size size = size_of(grid);
    latents = unpack_tokens(latents, size.height, size.width);
  }
  const Size size = size_of(settings.at("picture_size"));
  const bool in_stages = manifest.at("decoder_stages").kind == Json::Kind::list;
  const std::vector<float> picture =
      in_stages ? decode_stages(runtime, folder, manifest, host, std::move(latents))
                : decode(Graph(runtime, folder, manifest, "decoder"), std::move(latents), manifest);
  write_picture(options["--output"], picture, size.height, size.width);
  std::cout << "saved " << options["--output"] << "\n";
}

}  // namespace

int main(int count, char** arguments) {
  std::map<std::string, std::string> options = {{"--prompt", "0"},
                                                {"--embeddings", ""},
                                                {"--output", "picture.ppm"},
                                                {"--runtime", "libonnxruntime.so"},
                                                {"--plugin", "libonnxruntime_providers_qnn.so"},
                                                {"--backend", "libQnnHtp.so"}};
  std::string folder;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (options.count(argument) && i + 1 < count) {
      options[argument] = arguments[++i];
    } else if (argument[0] != '-' && folder.empty()) {
      folder = argument;
    } else {
      std::cerr << kUsage;
      return 2;
    }
  }
  if (folder.empty()) {
    std::cerr << kUsage;
    return 2;
  }
  try {
    run(folder, options);
  } catch (const std::exception& error) {
    std::cerr << "run_bundle: " << error.what() << "\n";
    return 1;
  }
  return 0;
}

// The part of ONNX Runtime's C API that run_bundle uses, as its binary interface.
//
// No header of ONNX Runtime is needed to build: the library is opened when the program starts. `OrtApi` is a table of
// functions to which releases only append, so a function keeps its place in it; the places are those of the public
// onnxruntime_c_api.h, and API version 22 (ONNX Runtime 1.22) is the first with execution providers as plug-ins.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtEpDevice;
struct OrtTensorTypeAndShapeInfo;

constexpr uint32_t kOrtApiVersion = 22;
constexpr int kOrtLoggingError = 3;
constexpr int kOrtTensorFloat = 1;       // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
constexpr int kOrtArenaAllocator = 1;
constexpr int kOrtMemTypeDefault = 0;

struct OrtApi {
  void* functions[318];  // of version 22

  template <typename Function>
  Function* at(std::size_t place) const {
    return reinterpret_cast<Function*>(functions[place]);
  }
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// A function of the table: `ort::CreateEnv::of(api)(...)`.
#define ORT_FUNCTION(NAME, PLACE, RESULT, ...)                                  \
  struct NAME {                                                                 \
    using Type = RESULT(__VA_ARGS__);                                           \
    static Type* of(const OrtApi* api) { return api->at<Type>(PLACE); }         \
  }

namespace ort {
ORT_FUNCTION(GetErrorMessage, 2, const char*, const OrtStatus*);
ORT_FUNCTION(CreateEnv, 3, OrtStatus*, int level, const char* name, OrtEnv**);
ORT_FUNCTION(CreateSession, 7, OrtStatus*, const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);
ORT_FUNCTION(Run, 9, OrtStatus*, OrtSession*, const OrtRunOptions*, const char* const* input_names,
             const OrtValue* const* inputs, std::size_t input_count, const char* const* output_names,
             std::size_t output_count, OrtValue** outputs);
ORT_FUNCTION(CreateSessionOptions, 10, OrtStatus*, OrtSessionOptions**);
ORT_FUNCTION(SetSessionLogSeverityLevel, 22, OrtStatus*, OrtSessionOptions*, int level);
ORT_FUNCTION(SetIntraOpNumThreads, 24, OrtStatus*, OrtSessionOptions*, int threads);
ORT_FUNCTION(CreateTensorWithDataAsOrtValue, 49, OrtStatus*, const OrtMemoryInfo*, void* data, std::size_t bytes,
             const int64_t* shape, std::size_t dimensions, int type, OrtValue**);
ORT_FUNCTION(GetTensorMutableData, 51, OrtStatus*, OrtValue*, void** data);
ORT_FUNCTION(GetTensorShapeElementCount, 64, OrtStatus*, const OrtTensorTypeAndShapeInfo*, std::size_t*);
ORT_FUNCTION(GetTensorTypeAndShape, 65, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**);
ORT_FUNCTION(CreateCpuMemoryInfo, 69, OrtStatus*, int allocator, int type, OrtMemoryInfo**);
ORT_FUNCTION(ReleaseEnv, 92, void, OrtEnv*);
ORT_FUNCTION(ReleaseStatus, 93, void, OrtStatus*);
ORT_FUNCTION(ReleaseMemoryInfo, 94, void, OrtMemoryInfo*);
ORT_FUNCTION(ReleaseSession, 95, void, OrtSession*);
ORT_FUNCTION(ReleaseValue, 96, void, OrtValue*);
ORT_FUNCTION(ReleaseTensorTypeAndShapeInfo, 99, void, OrtTensorTypeAndShapeInfo*);
ORT_FUNCTION(ReleaseSessionOptions, 100, void, OrtSessionOptions*);
ORT_FUNCTION(AddSessionConfigEntry, 130, OrtStatus*, OrtSessionOptions*, const char* key, const char* value);
ORT_FUNCTION(RegisterExecutionProviderLibrary, 301, OrtStatus*, OrtEnv*, const char* name, const char* path);
ORT_FUNCTION(GetEpDevices, 303, OrtStatus*, const OrtEnv*, const OrtEpDevice* const** devices, std::size_t* count);
ORT_FUNCTION(AppendExecutionProvider, 304, OrtStatus*, OrtSessionOptions*, OrtEnv*, const OrtEpDevice* const* devices,
             std::size_t device_count, const char* const* keys, const char* const* values, std::size_t option_count);
ORT_FUNCTION(EpDevice_EpName, 312, const char*, const OrtEpDevice*);
}  // namespace ort

#undef ORT_FUNCTION

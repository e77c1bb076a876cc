// The part of onnxruntime's C interface that the library needs. The table of functions only ever grows at its end, so
// that a place in it is a function's for good; kVersion is the first release's that has all of those here (1.17).
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmvmamba {
namespace onnxruntime {

constexpr uint32_t kVersion = 17;
constexpr const char* kRelease = "1.17";

// onnxruntime's own, which are only passed on
struct Status;
struct Options;
struct Domain;
struct KernelInfo;
struct Context;
struct Value;
struct TensorInfo;
struct ShapeContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1 };

// Functions by their place; `Function` is the type that the interface gives it.
class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

  Status* create_status(ErrorCode code, const char* words) const {
    return at<Status*(int, const char*)>(0)(code, words);
  }
  Status* create_domain(const char* name, Domain** out) const {
    return at<Status*(const char*, Domain**)>(26)(name, out);
  }
  Status* add_op(Domain* domain, const void* op) const { return at<Status*(Domain*, const void*)>(27)(domain, op); }
  Status* add_domain(Options* options, Domain* domain) const {
    return at<Status*(Options*, Domain*)>(28)(options, domain);
  }
  Status* tensor_data(const Value* value, void** out) const {
    return at<Status*(const Value*, void**)>(51)(value, out);
  }
  Status* element_type(const TensorInfo* info, int* out) const {
    return at<Status*(const TensorInfo*, int*)>(60)(info, out);
  }
  Status* dimensions_count(const TensorInfo* info, size_t* out) const {
    return at<Status*(const TensorInfo*, size_t*)>(61)(info, out);
  }
  Status* dimensions(const TensorInfo* info, int64_t* out, size_t count) const {
    return at<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, out, count);
  }
  Status* dimension_names(const TensorInfo* info, const char** out, size_t count) const {
    return at<Status*(const TensorInfo*, const char**, size_t)>(63)(info, out, count);
  }
  Status* tensor_info(const Value* value, TensorInfo** out) const {
    return at<Status*(const Value*, TensorInfo**)>(65)(value, out);
  }
  Status* string_attribute(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return at<Status*(const KernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return at<Status*(const Context*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t count, Value** out) const {
    return at<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims, count, out);
  }
  void release_status(Status* status) const { at<void(Status*)>(93)(status); }
  void release_tensor_info(TensorInfo* info) const { at<void(TensorInfo*)>(99)(info); }
  void release_domain(Domain* domain) const { at<void(Domain*)>(101)(domain); }
  Status* input_shape(const ShapeContext* context, size_t index, TensorInfo** out) const {
    return at<Status*(const ShapeContext*, size_t, TensorInfo**)>(268)(context, index, out);
  }
  Status* set_output_shape(ShapeContext* context, size_t index, const TensorInfo* info) const {
    return at<Status*(ShapeContext*, size_t, const TensorInfo*)>(270)(context, index, info);
  }
  // Calls function(data, i) for each i below `total` from threads of the session.
  Status* parallel_for(const Context* context, void (*function)(void*, size_t), size_t total, void* data) const {
    return at<Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, function, total, 0,
                                                                                            data);
  }

 private:
  template <typename Function> Function* at(int place) const { return reinterpret_cast<Function*>(table_[place]); }

  void* const* table_;
};

struct ApiBase {
  const void* (*get_api)(uint32_t version);  // null if the runtime is older
  const char* (*get_version)();
};

// What an operator is, as version 17 reads it.
struct Op {
  uint32_t version;
  void* (*create)(const Op*, const void* api, const KernelInfo*);  // not used: the second form gives a status
  const char* (*name)(const Op*);
  const char* (*provider)(const Op*);
  int (*input_type)(const Op*, size_t);
  size_t (*inputs)(const Op*);
  int (*output_type)(const Op*, size_t);
  size_t (*outputs)(const Op*);
  void (*compute)(void*, Context*);  // not used, as above
  void (*destroy)(void*);
  int (*input_characteristic)(const Op*, size_t);
  int (*output_characteristic)(const Op*, size_t);
  int (*input_memory)(const Op*, size_t);
  int (*variadic_input_min)(const Op*);
  int (*variadic_input_same)(const Op*);
  int (*variadic_output_min)(const Op*);
  int (*variadic_output_same)(const Op*);
  Status* (*create_with_status)(const Op*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_with_status)(void*, Context*);
  Status* (*infer_shape)(const Op*, ShapeContext*);
  int (*first_version)(const Op*);
  int (*last_version)(const Op*);
  void* later[4];  // of later versions, empty
};

}  // namespace onnxruntime
}  // namespace mmvmamba

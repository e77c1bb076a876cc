// The operator SS2DScan of the domain mmvmamba for onnxruntime, on a CPU. Its inputs, its output and what it computes
// stand in scan_map.h; the session's threads share the tasks.
#include <atomic>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "../../csrc/scan_map.h"
#include "api.h"

namespace mmvmamba {
namespace onnxruntime {
namespace {

using namespace scan_map;

// What a failed call of the runtime leaves, on its way through C++.
struct Failed {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failed{status};
}

[[noreturn]] void refuse(const Api& api, const std::string& words) {
  throw Failed{api.create_status(kInvalidArgument, ("mmvmamba::SS2DScan: " + words).c_str())};
}

// Runs a function; what it throws becomes the status that the runtime expects.
template <typename Function> Status* guarded(const Api& api, const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return api.create_status(kFail, error.what());
  }
}

struct InfoOwner {  // releases what the runtime lends
  const Api& api;
  TensorInfo* info = nullptr;
  ~InfoOwner() {
    if (info != nullptr) api.release_tensor_info(info);
  }
};

const float* read_input(const Api& api, const Context* context, size_t index, Shape& shape) {
  const Value* value = nullptr;
  check(api.input(context, index, &value));
  InfoOwner owner{api};
  check(api.tensor_info(value, &owner.info));
  int type = 0;
  check(api.element_type(owner.info, &type));
  if (type != kFloat) refuse(api, std::string(kInputs[index]) + " is not float32");
  size_t rank = 0;
  check(api.dimensions_count(owner.info, &rank));
  shape.resize(rank);
  check(api.dimensions(owner.info, shape.data(), rank));
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return static_cast<const float*>(data);
}

struct Kernel {
  Api api;
  int mode;

  void compute(Context* context) const {
    Shape shapes[kInputCount];
    const float* data[kInputCount];
    for (size_t i = 0; i < kInputCount; ++i) data[i] = read_input(api, context, i, shapes[i]);
    const std::string words = misfit(shapes);
    if (!words.empty()) refuse(api, words);
    Value* output = nullptr;
    check(api.output(context, 0, shapes[0].data(), shapes[0].size(), &output));
    void* y = nullptr;
    check(api.tensor_data(output, &y));
    if (numel(shapes[0]) == 0) return;
    const MapScan scan(mode, shapes, data, static_cast<float*>(y));
    run_all(context, scan);
    scan.finish();
  }

 private:
  struct Work {
    const MapScan& scan;
    std::atomic<bool> failed;
  };

  void run_all(Context* context, const MapScan& scan) const {
    Work work{scan, {false}};
    const auto run = [](void* data, size_t task) {
      Work& own = *static_cast<Work*>(data);
      try {
        own.scan.run(static_cast<int64_t>(task));
      } catch (...) {  // no exception may leave the runtime's thread
        own.failed = true;
      }
    };
    check(api.parallel_for(context, run, static_cast<size_t>(scan.tasks()), &work));
    if (work.failed) throw std::bad_alloc();
  }
};

Status* create_kernel(const Op*, const void* table, const KernelInfo* info, void** out) {
  const Api api(table);
  return guarded(api, [&] {
    char name[32] = "";
    size_t size = sizeof(name);
    check(api.string_attribute(info, "scan_mode", name, &size));
    std::string words;
    const int mode = find_mode(name, words);
    if (mode < 0) refuse(api, words);
    *out = new Kernel{api, mode};
  });
}

Status* compute_kernel(void* kernel, Context* context) {
  const Kernel& own = *static_cast<Kernel*>(kernel);
  return guarded(own.api, [&] { own.compute(context); });
}

const void* shape_table = nullptr;  // of the runtime that registered the library; infer_shape is given none

Status* infer_shape(const Op*, ShapeContext* context) {
  const Api api(shape_table);
  return guarded(api, [&] {
    TensorInfo* info = nullptr;  // the context's own
    check(api.input_shape(context, 0, &info));
    size_t rank = 0;
    check(api.dimensions_count(info, &rank));
    if (rank == 0) return;  // so the runtime gives an unknown shape
    std::vector<int64_t> sizes(rank);
    std::vector<const char*> names(rank, "");
    check(api.dimensions(info, sizes.data(), rank));
    check(api.dimension_names(info, names.data(), rank));
    for (size_t i = 0; i < rank; ++i) {
      if (sizes[i] < 0 && *names[i] == 0) return;  // the runtime would take an unknown size for a size of -1
    }
    check(api.set_output_shape(context, 0, info));
  });
}

Op make_op() {
  Op op{};
  op.version = kVersion;
  op.name = [](const Op*) { return "SS2DScan"; };
  op.provider = [](const Op*) -> const char* { return nullptr; };  // the CPU's
  op.input_type = op.output_type = [](const Op*, size_t) -> int { return kFloat; };
  op.inputs = [](const Op*) { return kInputCount; };
  op.outputs = [](const Op*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = op.output_characteristic = [](const Op*, size_t) { return 0; };  // required
  op.input_memory = [](const Op*, size_t) { return 0; };                                     // the default
  op.variadic_input_min = op.variadic_input_same = [](const Op*) { return 1; };
  op.variadic_output_min = op.variadic_output_same = [](const Op*) { return 1; };
  op.create_with_status = create_kernel;
  op.compute_with_status = compute_kernel;
  op.infer_shape = infer_shape;
  op.first_version = op.last_version = [](const Op*) { return 1; };
  return op;
}

}  // namespace
}  // namespace onnxruntime
}  // namespace mmvmamba

// What SessionOptions.register_custom_ops_library calls, by this name.
extern "C" __attribute__((visibility("default"))) mmvmamba::onnxruntime::Status* RegisterCustomOps(
    mmvmamba::onnxruntime::Options* options, const mmvmamba::onnxruntime::ApiBase* base) {
  using namespace mmvmamba::onnxruntime;
  const void* table = base->get_api(kVersion);
  if (table == nullptr) {
    const void* first = base->get_api(1);
    if (first == nullptr) return nullptr;
    const std::string words =
        std::string("mmvmamba needs onnxruntime ") + kRelease + " or newer, and this is " + base->get_version();
    return Api(first).create_status(kFail, words.c_str());
  }
  const Api api(table);
  return guarded(api, [&] {
    static const Op op = make_op();
    static Domain* domain = nullptr;  // as long-lived as the library: sessions keep a pointer to it
    shape_table = table;
    if (domain == nullptr) {
      Domain* fresh = nullptr;
      check(api.create_domain("mmvmamba", &fresh));
      Status* status = api.add_op(fresh, &op);
      if (status != nullptr) {
        api.release_domain(fresh);
        throw Failed{status};
      }
      domain = fresh;
    }
    check(api.add_domain(options, domain));
  });
}

// The selective scan of a map for onnxruntime: the operator SS2DScan of the domain mmvmamba, on a CPU.
//
//   x (B, H, W, D), projections (B, H, W, 4 (R + 2N)) in the order dt, B, C of each route, dt_weight (4, R, D),
//   dt_bias (4, D), A (4, N, D), skip (D), all float, and the attribute scan_mode -> y (B, H, W, D)
//
// A task owns a block of channels of one image, as in the op for torch, whose tile kernel this is; the session's
// threads share the tasks. A number does not depend on how many there are.
#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "api.h"
#include "common/ceil_div.h"
#include "common/routes.h"
#include "ss2d/cpu_tile.h"

namespace mmvmamba {
namespace onnxruntime {
namespace {

using namespace ss2d;

constexpr const char* kInputs[] = {"x", "projections", "dt_weight", "dt_bias", "A", "skip"};
constexpr size_t kInputCount = sizeof(kInputs) / sizeof(kInputs[0]);
constexpr size_t kRanks[] = {4, 4, 3, 2, 3, 1};

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

struct Shape {
  std::vector<int64_t> sizes;

  int64_t operator[](size_t i) const { return sizes[i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }
  std::string text() const {
    std::string out = "(";
    for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
    return out + ")";
  }
};

struct Input {
  Shape shape;
  const float* data;
};

struct InfoOwner {  // releases what the runtime lends
  const Api& api;
  TensorInfo* info = nullptr;
  ~InfoOwner() {
    if (info != nullptr) api.release_tensor_info(info);
  }
};

Input read_input(const Api& api, const Context* context, size_t index) {
  const Value* value = nullptr;
  check(api.input(context, index, &value));
  InfoOwner owner{api};
  check(api.tensor_info(value, &owner.info));
  int type = 0;
  check(api.element_type(owner.info, &type));
  if (type != kFloat) refuse(api, std::string(kInputs[index]) + " is not float32");
  size_t rank = 0;
  check(api.dimensions_count(owner.info, &rank));
  Input input;
  input.shape.sizes.resize(rank);
  check(api.dimensions(owner.info, input.shape.sizes.data(), rank));
  if (rank != kRanks[index]) {
    refuse(api, std::string(kInputs[index]) + " has shape " + input.shape.text() + ", expected " +
                    std::to_string(kRanks[index]) + " dimensions");
  }
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  input.data = static_cast<const float*>(data);
  return input;
}

void expect(const Api& api, const Input* inputs, size_t index, const Shape& expected, const char* letters) {
  if (inputs[index].shape.sizes != expected.sizes) {
    refuse(api, std::string(kInputs[index]) + " has shape " + inputs[index].shape.text() + ", expected " + letters +
                    " = " + expected.text() + " for x of shape " + inputs[0].shape.text());
  }
}

// Rows of `from` numbers as rows of `to`, those beyond zero.
std::vector<float> pad_rows(const float* data, int64_t rows, int64_t from, int64_t to) {
  std::vector<float> out(rows * to);
  for (int64_t row = 0; row < rows; ++row) std::copy(data + row * from, data + (row + 1) * from, &out[row * to]);
  return out;
}

// An input whose rows of channels are whole vectors: the runtime's memory, or a copy.
struct Padded {
  std::vector<float> own;
  const float* data;

  Padded(const Input& input, int64_t channels, int64_t padded) : data(input.data) {
    if (channels == padded) return;
    own = pad_rows(input.data, input.shape.numel() / channels, channels, padded);
    data = own.data();
  }
};

struct Problem {
  int64_t mode, batch, height, width, pixels, channels, padded, rank, states, columns;
  const float *x, *projections, *dt_weight, *dt_bias, *A, *skip;
  float* y;
  int block_width;
  int64_t blocks;
};

// The pixels of `steps` steps of route k from step `start` on; like route_pixel, but with one division.
void find_pixels(const Problem& p, int64_t k, int64_t start, int steps, int64_t* pixel) {
  const Routes& routes = kScanModes[p.mode].routes;
  const bool reverse = routes.reverse >> k & 1;
  const int64_t first = reverse ? p.pixels - start - steps : start;  // the lowest step of the forward order
  if (routes.column >> k & 1) {
    int64_t row = first % p.height, column = first / p.height;
    for (int t = 0; t < steps; ++t) {
      pixel[t] = row * p.width + column;
      if (++row == p.height) row = 0, ++column;
    }
  } else {
    for (int t = 0; t < steps; ++t) pixel[t] = first + t;
  }
  if (reverse) std::reverse(pixel, pixel + steps);
}

// All routes over one block of channels of one image.
void run_task(const Problem& p, int64_t task) {
  const int64_t image = task / p.blocks, first = task % p.blocks * p.block_width;
  const int own = static_cast<int>(std::min<int64_t>(p.block_width, p.padded - first));
  const int64_t offset = image * p.pixels * p.padded + first;
  skip_forward(p.pixels, p.padded, own, p.skip + first, p.x + offset, p.y + offset);
  std::vector<float> h(p.states * p.padded);
  int64_t pixel[kSteps];
  for (int64_t k = 0; k < kRoutes; ++k) {
    Block block{};
    block.channels = p.padded, block.columns = kRoutes * p.columns;
    block.rank = static_cast<int>(p.rank), block.states = static_cast<int>(p.states), block.width = own;
    block.dt_weight = p.dt_weight + k * p.rank * p.padded + first;
    block.bias = p.dt_bias + k * p.padded + first;
    block.A = p.A + k * p.states * p.padded + first;
    block.x = p.x + offset;
    block.projections = p.projections + image * p.pixels * block.columns + k * p.columns;
    std::fill(h.begin(), h.end(), 0.f);
    for (int64_t start = 0; start < p.pixels; start += kSteps) {
      const int steps = static_cast<int>(std::min<int64_t>(kSteps, p.pixels - start));
      find_pixels(p, k, start, steps, pixel);
      forward_tile(block, pixel, steps, h.data(), p.y + offset);
    }
  }
}

struct Kernel {
  Api api;
  int64_t mode;

  void compute(Context* context) const {
    Input inputs[kInputCount];
    for (size_t i = 0; i < kInputCount; ++i) inputs[i] = read_input(api, context, i);
    const Shape &x = inputs[0].shape, &weight = inputs[2].shape, &decay = inputs[4].shape;
    Problem p{};
    p.mode = mode, p.batch = x[0], p.height = x[1], p.width = x[2], p.channels = x[3];
    p.rank = weight[1], p.states = decay[1], p.columns = p.rank + 2 * p.states, p.pixels = p.height * p.width;
    expect(api, inputs, 1, {{p.batch, p.height, p.width, kRoutes * p.columns}}, "(B, H, W, 4 (R + 2N))");
    expect(api, inputs, 2, {{kRoutes, p.rank, p.channels}}, "(4, R, D)");
    expect(api, inputs, 3, {{kRoutes, p.channels}}, "(4, D)");
    expect(api, inputs, 4, {{kRoutes, p.states, p.channels}}, "(4, N, D)");
    expect(api, inputs, 5, {{p.channels}}, "(D)");
    Value* output = nullptr;
    check(api.output(context, 0, x.sizes.data(), x.sizes.size(), &output));
    void* y = nullptr;
    check(api.tensor_data(output, &y));
    if (x.numel() == 0) return;

    p.padded = ceil_div(p.channels, kLanes) * kLanes;
    const Padded rows(inputs[0], p.channels, p.padded), dt_weight(inputs[2], p.channels, p.padded),
        bias(inputs[3], p.channels, p.padded), A(inputs[4], p.channels, p.padded),
        skip(inputs[5], p.channels, p.padded);
    p.x = rows.data, p.projections = inputs[1].data, p.dt_weight = dt_weight.data, p.dt_bias = bias.data;
    p.A = A.data, p.skip = skip.data;
    std::vector<float> result(p.padded == p.channels ? 0 : p.batch * p.pixels * p.padded);
    p.y = result.empty() ? static_cast<float*>(y) : result.data();
    // a channel's numbers do not depend on its block, so that few images are cut finer, for many threads
    const int64_t widest = p.batch * ceil_div(p.padded, int64_t{kWidth}) < kFewTasks ? 4 * kLanes : kWidth;
    p.block_width = static_cast<int>(ceil_div(p.padded / kLanes, ceil_div(p.padded, widest)) * kLanes);
    p.blocks = ceil_div(p.padded, int64_t{p.block_width});
    run_all(context, p);
    for (int64_t row = 0; !result.empty() && row < p.batch * p.pixels; ++row) {
      const float* from = result.data() + row * p.padded;
      std::copy(from, from + p.channels, static_cast<float*>(y) + row * p.channels);
    }
  }

 private:
  static constexpr int64_t kFewTasks = 8;

  struct Work {
    const Problem& problem;
    std::atomic<bool> failed;
  };

  void run_all(Context* context, const Problem& p) const {
    Work work{p, {false}};
    const auto run = [](void* data, size_t task) {
      Work& own = *static_cast<Work*>(data);
      try {
        run_task(own.problem, static_cast<int64_t>(task));
      } catch (...) {  // no exception may leave the runtime's thread
        own.failed = true;
      }
    };
    check(api.parallel_for(context, run, static_cast<size_t>(p.batch * p.blocks), &work));
    if (work.failed) throw std::bad_alloc();
  }
};

Status* create_kernel(const Op*, const void* table, const KernelInfo* info, void** out) {
  const Api api(table);
  return guarded(api, [&] {
    char name[32] = "";
    size_t size = sizeof(name);
    check(api.string_attribute(info, "scan_mode", name, &size));
    const int mode = find_scan_mode(name);
    if (mode < 0 || !comes_in_pairs(kScanModes[mode].routes)) {
      refuse(api, std::string("scan_mode is '") + name + "', expected cross2d, unidi or bidi");
    }
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

// The operator SS2DScan of the domain mmvmamba for OpenVINO, on a CPU. Its inputs, its output and what it computes
// stand in scan_map.h; the threads of the request, which OpenVINO has limited, share the tasks.
#include <tbb/parallel_for.h>

#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/version.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "../../csrc/scan_map.h"

#ifndef MMVMAMBA_OPENVINO
#error "MMVMAMBA_OPENVINO is not defined, expected the version of OpenVINO whose headers are used"
#endif

namespace mmvmamba {
namespace openvino {
namespace {

using scan_map::kInputCount;
using scan_map::kInputs;
using scan_map::MapScan;
using scan_map::Shape;

class SS2DScan : public ov::op::Op {
 public:
  OPENVINO_OP("SS2DScan", "mmvmamba");

  void validate_and_infer_types() override {
    NODE_VALIDATION_CHECK(this, get_input_size() == kInputCount, get_input_size(), " inputs, expected ", kInputCount);
    Shape shapes[kInputCount];
    bool known = true;
    for (size_t i = 0; i < kInputCount; ++i) {
      const ov::element::Type type = get_input_element_type(i);
      NODE_VALIDATION_CHECK(this, type.compatible(ov::element::f32), kInputs[i], " is ", type, ", expected float32");
      const ov::PartialShape& shape = get_input_partial_shape(i);
      known = known && shape.is_static();
      if (shape.is_dynamic()) continue;
      shapes[i] = sizes(shape.get_shape());
      const std::string words = scan_map::rank_misfit(i, shapes[i]);
      NODE_VALIDATION_CHECK(this, words.empty(), words);
    }
    std::string words = known ? scan_map::misfit(shapes) : "";
    NODE_VALIDATION_CHECK(this, words.empty(), words);
    NODE_VALIDATION_CHECK(this, scan_map::find_mode(scan_mode_, words) >= 0, words);
    set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("scan_mode", scan_mode_);
    return true;
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    auto copy = std::make_shared<SS2DScan>();
    copy->scan_mode_ = scan_mode_;
    copy->set_arguments(inputs);
    copy->constructor_validate_and_infer_types();
    return copy;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    Shape shapes[kInputCount];
    const float* data[kInputCount];
    for (size_t i = 0; i < kInputCount; ++i) {
      shapes[i] = sizes(inputs[i].get_shape());
      data[i] = inputs[i].data<const float>();
    }
    std::string words = scan_map::misfit(shapes);
    OPENVINO_ASSERT(words.empty(), "mmvmamba::SS2DScan: ", words);
    const int mode = scan_map::find_mode(scan_mode_, words);
    OPENVINO_ASSERT(mode >= 0, "mmvmamba::SS2DScan: ", words);
    outputs[0].set_shape(inputs[0].get_shape());
    if (scan_map::numel(shapes[0]) == 0) return true;
    const MapScan scan(mode, shapes, data, outputs[0].data<float>());
    tbb::parallel_for(int64_t{0}, scan.tasks(), [&](int64_t task) { scan.run(task); });
    scan.finish();
    return true;
  }

 private:
  static Shape sizes(const ov::Shape& shape) { return Shape(shape.begin(), shape.end()); }

  std::string scan_mode_;
};

}  // namespace
}  // namespace openvino
}  // namespace mmvmamba

// What Core.add_extension calls, by this name.
extern "C" __attribute__((visibility("default"))) void create_extensions(std::vector<ov::Extension::Ptr>& extensions) {
  using mmvmamba::openvino::SS2DScan;
  const std::string running = ov::get_openvino_version().buildNumber;
  OPENVINO_ASSERT(running == MMVMAMBA_OPENVINO, "mmvmamba's library was built for OpenVINO ", MMVMAMBA_OPENVINO,
                  ", and this is ", running, "; build it again: python -m mmvmamba.export.openvino");
  extensions = {std::make_shared<ov::OpExtension<SS2DScan>>(),
                std::make_shared<ov::frontend::onnx::OpExtension<SS2DScan>>("SS2DScan", "mmvmamba")};
}

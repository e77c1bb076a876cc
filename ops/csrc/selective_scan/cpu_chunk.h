// Short-vector primitives of the CPU scan: each works on one chunk of one channel, vectorised along time.
// float versions are compiled for several instruction sets and chosen at load time; double ones are for reference.
#pragma once

namespace mmvmamba {

constexpr int kRows = 4;    // channels that advance together
constexpr int kChunk = 64;  // steps between two saved states; CHUNK['cpu'] in ops/library.py

// x[t] = softplus(x[t]) = max(x, 0) + log1p(exp(-|x|))
void softplus(float* x, int steps);
void softplus(double* x, int steps);

// g[t] *= sigmoid(x[t]), the derivative of softplus
void mul_sigmoid(const float* x, float* g, int steps);
void mul_sigmoid(const double* x, double* g, int steps);

// One state of kRows channels over one chunk: h = exp(dt A) h + dt u B, y += C h. dt, u and y hold kRows rows of kChunk
// steps, A and h one number a row; B and C are shared. Rows are independent recurrences, which hides their latency.
void scan_chunk(const float* dt, const float* u, const float* B, const float* C, const float* A, float* h, float* y,
                int steps);
void scan_chunk(const double* dt, const double* u, const double* B, const double* C, const double* A, double* h,
                double* y, int steps);

// The adjoint of scan_chunk. h0 is the state before the chunk; flow is the adjoint that comes in from the right,
// exp(dt A) s of the step after the chunk, and is replaced by that of the chunk's first step. Adds to du and ddt
// (rows), to dB and dC (summed over the rows) and to dA.
void scan_chunk_backward(const float* dt, const float* u, const float* B, const float* C, const float* dy,
                         const float* A, const float* h0, float* flow, float* du, float* ddt, float* dB, float* dC,
                         float* dA, int steps);
void scan_chunk_backward(const double* dt, const double* u, const double* B, const double* C, const double* dy,
                         const double* A, const double* h0, double* flow, double* du, double* ddt, double* dB,
                         double* dC, double* dA, int steps);

}  // namespace mmvmamba

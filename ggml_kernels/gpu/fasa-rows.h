// Rows of K and V as they lie in the cache, of every type that the kernels read, and the cells whose rows these are. Where rows
// lie is known to fasa_row_at alone.

#pragma once

#include "fasa-common.h"

//
// rows
//

FASA_FN FASA_GLOBAL const char * fasa_row_at(FASA_GLOBAL const char * rows, uint64_t nb, int32_t cell) {
    return rows + cell*nb;
}

// what a lane has loaded of a row: as it lies in the cache, so that nothing waits for it before it is needed
struct fasa_raw {
    uint32_t x[FASA_ELEMENTS];
};

// in pairs of bytes, since blocks of quantized types begin at even addresses
FASA_FN uint32_t fasa_load_pairs(FASA_GLOBAL const char * p) {
    FASA_GLOBAL const uint16_t * pairs = (FASA_GLOBAL const uint16_t *) p;
    return pairs[0] | (uint32_t) pairs[1] << 16;
}

FASA_FN void fasa_load_four(FASA_GLOBAL const char * p, FASA_THREAD uint32_t * res) {
    const uint4 x = *(FASA_GLOBAL const uint4 *) p;
    res[0] = x.x; res[1] = x.y; res[2] = x.z; res[3] = x.w;
}

// the i-th eight elements of a row; quantized types lie in blocks of 32: an f16 scale, then a byte for each element (q8_0), or
// 16 bytes, the lower halves of which are the first 16 elements (q4_0)
FASA_FN void fasa_load_raw(int32_t type, FASA_GLOBAL const char * row, int32_t i, FASA_THREAD fasa_raw & res) {
    if (type == FASA_TYPE_F16 || type == FASA_TYPE_BF16) {
        fasa_load_four(row + 16*i, res.x);
    } else if (type == FASA_TYPE_F32) {
        fasa_load_four(row + 32*i,      res.x);
        fasa_load_four(row + 32*i + 16, res.x + 4);
    } else {
        const bool is_q8 = type == FASA_TYPE_Q8_0;
        FASA_GLOBAL const char * block = row + i/4*(is_q8 ? 34 : 18);
        FASA_GLOBAL const char * bytes = block + 2 + (is_q8 ? i%4 : i%2)*8;
        res.x[0] = fasa_load_pairs(bytes);
        res.x[1] = fasa_load_pairs(bytes + 4);
        res.x[2] = *(FASA_GLOBAL const uint16_t *) block;
    }
}

FASA_FN void fasa_to_floats(int32_t type, FASA_THREAD const fasa_raw & raw, int32_t i, FASA_THREAD float * res) {
    if (type == FASA_TYPE_F16) {
        FASA_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
            res[2*j + 0] = fasa_from_f16((uint16_t) (raw.x[j] & 0xFFFF));
            res[2*j + 1] = fasa_from_f16((uint16_t) (raw.x[j] >> 16));
        }
    } else if (type == FASA_TYPE_BF16) {
        FASA_UNROLL
        for (int32_t j = 0; j < 4; ++j) {
            res[2*j + 0] = fasa_float(raw.x[j] << 16);
            res[2*j + 1] = fasa_float(raw.x[j] & 0xFFFF0000u);
        }
    } else if (type == FASA_TYPE_F32) {
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            res[j] = fasa_float(raw.x[j]);
        }
    } else {
        const bool    is_q8 = type == FASA_TYPE_Q8_0;
        const float   d     = fasa_from_f16((uint16_t) raw.x[2]);
        const int32_t shift = i%4/2*4;
        FASA_UNROLL
        for (int32_t j = 0; j < FASA_ELEMENTS; ++j) {
            const int32_t byte = raw.x[j/4] >> 8*(j%4) & 0xFF;
            res[j] = d*(float) (is_q8 ? (int32_t) (int8_t) byte : (byte >> shift & 0xF) - 8);
        }
    }
}

//
// cells
//

// the cells that a set of lanes attends to, by number: -1 for none
struct fasa_cells {
    FASA_GLOBAL const int32_t  * list; // ids, or
    FASA_GLOBAL const uint16_t * mask; // ... all that are not masked
    int32_t cell0;
    int32_t n;
};

FASA_FN int32_t fasa_cell_at(FASA_THREAD const fasa_cells & cells, int32_t i) {
    const int32_t cell = cells.cell0 + i;
    return cells.list ? cells.list[cell] : cells.mask[cell] != FASA_F16_MASKED ? cell : -1;
}

// those that a block of threads has listed itself
struct fasa_own_cells {
    FASA_SHARED const int32_t * list;
    int32_t n;
};

FASA_FN int32_t fasa_cell_at(FASA_THREAD const fasa_own_cells & cells, int32_t i) {
    return cells.list[i];
}

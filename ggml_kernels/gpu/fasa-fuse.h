// Which nodes of a graph a GPU backend may compute in one launch.

#pragma once

#include "ggml-impl.h"

// nodes that nothing is launched for
static bool fasa_is_view(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            return false;
    }
}

// the first node behind i that something is launched for; -1: there is none
static int fasa_next_node(const ggml_cgraph * graph, int i) {
    do {
        ++i;
    } while (i < graph->n_nodes && fasa_is_view(graph->nodes[i]));
    return i < graph->n_nodes && (graph->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE) ? i : -1;
}

// no launch of this graph writes it: an input, a constant, or a copy of another backend's, which the stream waits for
static bool fasa_is_input(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && !t->view_src;
}

static bool fasa_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * begin_a = (const char *) a->data;
    const char * begin_b = (const char *) b->data;
    return begin_a < begin_b + ggml_nbytes(b) && begin_b < begin_a + ggml_nbytes(a);
}

// node i is a FASA_SELECT: the FASA_ATTEND whose list it is and nobody else's, if nothing stands between them; -1: none
static int fasa_fused_attend(const ggml_cgraph * graph, int i) {
    const ggml_tensor * select = graph->nodes[i];
    const int next = select->op == GGML_OP_FASA_SELECT ? fasa_next_node(graph, i) : -1;
    if (next < 0) {
        return -1;
    }
    const ggml_tensor * attend = graph->nodes[next];
    if (attend->op != GGML_OP_FASA_ATTEND || attend->src[3] != select ||
        !ggml_node_has_n_uses(graph, i, 1) || !fasa_is_input(select->src[2]) || !fasa_is_input(select->src[5])) {
        return -1;
    }
    // what select reads may be dead by the time of attend, whose result then may lie there
    for (const ggml_tensor * src : select->src) {
        if (src && fasa_overlap(src, attend)) {
            return -1;
        }
    }
    return next;
}

// node i is the SET_ROWS of V: the FASA_STORE behind it, if both write for the same few tokens; -1: none
static int fasa_fused_store(const ggml_cgraph * graph, int i) {
    const ggml_tensor * rows = graph->nodes[i];
    const int next = rows->op == GGML_OP_SET_ROWS ? fasa_next_node(graph, i) : -1;
    if (next < 0 || graph->nodes[next]->op != GGML_OP_FASA_STORE) {
        return -1;
    }
    const ggml_tensor * store = graph->nodes[next];
    const ggml_tensor * from  = rows->src[0];
    const bool is_copied =
        (rows->type == GGML_TYPE_F32 || rows->type == GGML_TYPE_F16 || rows->type == GGML_TYPE_BF16) &&
        from->type == GGML_TYPE_F32 && from->nb[0] == sizeof(float) && ggml_nrows(from) == from->ne[1] &&
        rows->src[1]->type == GGML_TYPE_I64 && ggml_is_vector(rows->src[1]) && ggml_is_contiguous(rows->src[1]) &&
        fasa_is_input(rows->src[1]) && fasa_is_input(store->src[2]) && fasa_is_input(store->src[3]) && fasa_is_input(store->src[4]) &&
        rows->nb[0] == ggml_type_size(rows->type) && ggml_nrows(rows) == rows->ne[1];
    // the rows must not be those that store reads
    return is_copied && from->ne[1] <= 32 && !fasa_overlap(rows, store->src[1]) ? next : -1;
}

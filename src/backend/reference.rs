//! Every op in plain loops: the definition of right.

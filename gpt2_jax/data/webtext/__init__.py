# SPDX-License-Identifier: Apache-2.0
"""WebText: from links and pages to a dataset of documents, as a plain loop or on Apache Beam.

A stage is a pure function from a document to a document, or to a `Drop` with a named reason.
"""

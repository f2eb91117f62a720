// Package servertest tests adapter natskv against real NATS servers in this process. It is a module of its own so that the
// adapter's users need not have the server in theirs.
package servertest

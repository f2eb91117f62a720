// Package servertest holds pgstore against a PostgreSQL server of its own. It is a module of its own because its tests need
// the library, which the adapter does not.
package servertest

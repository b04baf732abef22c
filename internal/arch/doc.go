// Package arch holds no code: its tests keep the house in order. They read the
// import rows and bans that docs/ARCHITECTURE.md explains, and the size rules,
// and compare them with the module as it is.
package arch

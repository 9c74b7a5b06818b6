//go:build cgo && !nopkcs11

package keys

// pkcs11Linked says whether a PKCS #11 module can be loaded: it is a shared library in C.
const pkcs11Linked = true

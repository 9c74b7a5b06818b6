package main

// The key store drivers. Each registers itself with go.step.sm/crypto/kms under its URI scheme when the program starts, and
// does nothing else until a key of that scheme is used. They are linked into this program only: the agent and the proxy
// keep no authority keys. pkcs11 needs cgo; without it, its place is taken by an error that says so.
import (
	_ "go.step.sm/crypto/kms/awskms"
	_ "go.step.sm/crypto/kms/azurekms"
	_ "go.step.sm/crypto/kms/cloudkms"
	_ "go.step.sm/crypto/kms/pkcs11"
	_ "go.step.sm/crypto/kms/tpmkms"

	_ "github.com/signet-id/signet/ca/keys/lookup"
)

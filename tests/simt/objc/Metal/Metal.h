// As much of Foundation and Metal as lets clang parse ggml-metal's Objective-C: names, no meanings. Messages that are not
// declared here return id.

#pragma once

#include <dispatch.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define nil ((id) 0)
#define YES true
#define NO  false

typedef bool          BOOL;
typedef long          NSInteger;
typedef unsigned long NSUInteger;

typedef struct { NSUInteger location, length; } NSRange;
typedef struct { NSUInteger width, height, depth; } MTLSize;

NSRange NSMakeRange(NSUInteger location, NSUInteger length);
MTLSize MTLSizeMake(NSUInteger width, NSUInteger height, NSUInteger depth);

typedef struct { unsigned long state; id * itemsPtr; unsigned long * mutationsPtr; unsigned long extra[5]; } NSFastEnumerationState;

@interface NSObject
@end

@interface NSString : NSObject
- (const char *) UTF8String;
- (BOOL) isEqualToString: (id) other;
@end

@interface NSConstantString : NSString
@end

@interface NSNumber : NSObject
- (int) intValue;
+ (NSNumber *) numberWithInt: (int) value;
+ (NSNumber *) numberWithLong: (long) value;
+ (NSNumber *) numberWithUnsignedInteger: (NSUInteger) value;
@end

@interface NSArray<T> : NSObject
@property(readonly) NSUInteger count;
+ (instancetype) arrayWithObjects: (const id *) objects count: (NSUInteger) count;
- (id) objectAtIndexedSubscript: (NSUInteger) index;
- (NSUInteger) countByEnumeratingWithState: (NSFastEnumerationState *) state objects: (id *) objects count: (NSUInteger) count;
@end

@interface NSDictionary<K, V> : NSObject
+ (instancetype) dictionaryWithObjects: (const id *) objects forKeys: (const id *) keys count: (NSUInteger) count;
- (id) objectForKeyedSubscript: (id) key;
@end

@interface NSMutableDictionary<K, V> : NSDictionary
- (void) setObject: (id) object forKeyedSubscript: (id) key;
@end

@interface NSSet<T> : NSObject
- (BOOL) containsObject: (id) object;
@end

@interface NSScanner : NSObject
@property(assign) id charactersToBeSkipped;
- (BOOL) scanString: (id) string intoString: (id *) result;
- (BOOL) scanUpToString: (id) string intoString: (id *) result;
@end

@interface NSFileManager : NSObject
- (BOOL) isReadableFileAtPath: (id) path;
@end

@interface NSMutableString : NSString @end
@interface NSMutableSet<T> : NSSet @end
@interface NSMutableArray<T> : NSArray @end
@interface NSError : NSObject @end
@interface NSLock : NSObject @end
@interface NSBundle : NSObject @end
@interface NSURL : NSObject @end
@interface NSCharacterSet : NSObject @end

@interface NSProcessInfo : NSObject
@property(class, readonly) NSProcessInfo * processInfo;
@property(readonly) NSDictionary * environment;
@end

extern NSString * const NSLocalizedDescriptionKey;
extern NSString * const NSFileType;
extern NSString * const NSFileTypeSymbolicLink;

enum { NSUTF8StringEncoding };

typedef enum { MTLLanguageVersion2_0 } MTLLanguageVersion;
typedef NSInteger MTLGPUFamily;

enum {
    MTLGPUFamilyApple1 = 1001, MTLGPUFamilyApple6 = 1006, MTLGPUFamilyApple7 = 1007, MTLGPUFamilyCommon1 = 3001,
    MTLResourceStorageModeShared, MTLResourceStorageModePrivate, MTLDispatchTypeConcurrent, MTLDeviceLocationExternal,
    MTLDataTypeShort, MTLDataTypeInt, MTLDataTypeBool, MTLBarrierScopeBuffers,
};

@interface MTLCompileOptions : NSObject
@property(assign) id preprocessorMacros;
@property(assign) MTLLanguageVersion languageVersion;
@end

@interface MTLFunctionConstantValues : NSObject @end

@protocol MTLBlitCommandEncoder @end
@protocol MTLBuffer @end
@protocol MTLCommandBuffer @end
@protocol MTLCommandQueue @end
@protocol MTLComputeCommandEncoder @end
@protocol MTLFunction @end
@protocol MTLSharedEvent @end

@protocol MTLLibrary
- (NSArray *) functionNames;
@end

@protocol MTLComputePipelineState
@property(readonly) NSUInteger maxTotalThreadsPerThreadgroup;
@property(readonly) NSUInteger threadExecutionWidth;
@end

@protocol MTLDevice
@property(readonly) NSString * name;
@property(readonly) BOOL       hasUnifiedMemory;
@property(readonly) NSUInteger maxBufferLength;
@property(readonly) NSUInteger maxThreadgroupMemoryLength;
@property(readonly) NSUInteger currentAllocatedSize;
@property(readonly) uint64_t   recommendedMaxWorkingSetSize;
- (BOOL) supportsFamily: (MTLGPUFamily) family;
- (NSUInteger) location;
- (id<MTLLibrary>) newLibraryWithSource: (id) source options: (id) options error: (NSError **) error;
@end

id<MTLDevice> MTLCreateSystemDefaultDevice(void);
